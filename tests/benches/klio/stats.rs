//! Medians and spread: a noisy machine makes a mean, or a single run, worth little.

/// Values of the same thing, one a round.
#[derive(Debug, Clone, Default)]
pub struct Series(Vec<f64>);

impl Series {
    /// Adds a round's value.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The value of the newest round.
    pub fn last(&self) -> Option<f64> {
        self.0.last().copied()
    }

    /// How many values.
    pub fn len(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 values")]
        let len = self.0.len() as f64;
        len
    }

    /// The value below which a share `p` (0 to 1) of all lies; `NaN` without values.
    pub fn quantile(&self, p: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
        // Between two values, their mean weighted by distance.
        #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 values")]
        let place = p * last as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0..=last")]
        let below = place.floor() as usize;
        let above = (below + 1).min(last);
        sorted[below] + (sorted[above] - sorted[below]) * place.fract()
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The largest.
    pub fn max(&self) -> f64 {
        self.quantile(1.0)
    }

    /// The same with each value changed.
    pub fn map(&self, change: impl Fn(f64) -> f64) -> Self {
        self.0.iter().copied().map(change).collect()
    }

    /// Median with the least and the largest: `12.3 (11.0–15.2)`.
    pub fn show(&self, digits: usize) -> String {
        if self.0.is_empty() {
            return "-".to_owned();
        }
        let (median, min, max) = (self.median(), self.quantile(0.0), self.max());
        format!("{median:.digits$} ({min:.digits$}–{max:.digits$})")
    }

    /// Mean and its standard error: `12.3 ± 0.4`. Twice that error to either side holds the truth 19 times of 20.
    pub fn show_mean(&self, digits: usize) -> String {
        if self.0.len() < 2 {
            return "-".to_owned();
        }
        let mean = self.0.iter().sum::<f64>() / self.len();
        let squares: f64 = self.0.iter().map(|value| (value - mean).powi(2)).sum();
        let error = (squares / (self.len() - 1.0) / self.len()).sqrt();
        format!("{mean:.digits$} ± {error:.digits$}")
    }
}

impl FromIterator<f64> for Series {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}
