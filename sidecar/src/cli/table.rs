//! Aligned text tables, without colour or borders. Each cell is one line; other line ends are made visible.

use klio_telemetry::visible::line;

/// Columns are as wide as their widest cell; columns of numbers are aligned to the right.
pub fn render(header: &[&str], rows: &[Vec<String>]) -> String {
    let columns = header.len();
    let cell = |row: &[String], column: usize| {
        row.get(column).map(|text| line(text).into_owned()).unwrap_or_default()
    };
    let width = |column: usize| {
        let cells = rows.iter().map(|row| cell(row, column).chars().count());
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let right = |column: usize| {
        let mut cells = rows.iter().map(|row| cell(row, column)).filter(|c| !c.is_empty());
        !rows.is_empty() && cells.all(|c| c.starts_with(|f: char| f.is_ascii_digit()))
    };
    let layout: Vec<(usize, bool)> = (0..columns).map(|c| (width(c), right(c))).collect();
    let row = |cells: &[String]| {
        let parts: Vec<String> = layout
            .iter()
            .enumerate()
            .map(|(column, (width, right))| {
                let text = cell(cells, column);
                let pad = " ".repeat(width.saturating_sub(text.chars().count()));
                if *right { format!("{pad}{text}") } else { format!("{text}{pad}") }
            })
            .collect();
        format!("{}\n", parts.join("  ").trim_end())
    };
    let head: Vec<String> = header.iter().map(|h| (*h).to_owned()).collect();
    [row(&head)].into_iter().chain(rows.iter().map(|cells| row(cells))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_go_right() {
        let rows = vec![
            vec!["pg-1".into(), "7 B".into(), "0/1".into()],
            vec!["a-longer-name".into(), "1024 B".into()],
        ];
        let text = render(&["CLUSTER", "SIZE", "LSN"], &rows);
        let expected =
            "CLUSTER          SIZE  LSN\npg-1              7 B  0/1\na-longer-name  1024 B\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_cell_of_others_begins_no_line_and_moves_no_cursor() {
        let text = render(&["LABEL"], &[vec!["a\nb: problem\x1b[2K".into()]]);
        assert_eq!(text, "LABEL\na\\nb: problem\\u001b[2K\n");
    }

    #[test]
    fn no_rows_give_the_header_alone() {
        assert_eq!(render(&["A", "B"], &[]), "A  B\n");
    }
}
