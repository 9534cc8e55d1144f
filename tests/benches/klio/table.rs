//! Markdown tables, as they go into docs/benchmarks.md.

/// Prints a title and a table; the columns are padded so that a terminal shows it as well.
pub fn print(title: &str, head: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count());
        cells.chain(head.get(column).map(|h| h.chars().count())).max().unwrap_or(0)
    };
    let line = |cells: Vec<String>| {
        let padded: Vec<String> = cells
            .iter()
            .enumerate()
            .map(|(i, c)| format!("{c}{}", " ".repeat(width(i).saturating_sub(c.chars().count()))))
            .collect();
        println!("| {} |", padded.join(" | "));
    };
    println!("\n### {title}\n");
    line(head.iter().map(|&h| h.to_owned()).collect());
    line((0..head.len()).map(|i| "-".repeat(width(i))).collect());
    for row in rows {
        line(row.clone());
    }
    println!();
}

/// Bytes as MiB with one digit.
pub fn mib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "memory is below 2^52 bytes")]
    let bytes = bytes as f64;
    bytes / f64::from(1 << 20)
}
