//! Mean and variance of groups of channels, of an image in one piece or gathered from parts.

/// Mean and variance of each group of channels of each image, over the pixels that were seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Values in a group.
    pub count: f64,
    /// Mean and variance, `groups` in a row for each image.
    pub groups: Vec<(f64, f64)>,
}

impl Moments {
    /// Those of the pixels of both, which have the same groups and no pixel in common.
    ///
    /// Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    pub fn and(self, other: &Self) -> Self {
        let count = self.count + other.count;
        let (own, others) = (self.count / count, other.count / count);
        let joined = self.groups.iter().zip(&other.groups).map(|(a, b)| {
            let difference = b.0 - a.0;
            (a.0 + difference * others, a.1 * own + b.1 * others + difference * difference * own * others)
        });
        Self { count, groups: joined.collect() }
    }

    /// Means, and one over the standard deviations.
    pub(crate) fn normalisers(&self, epsilon: f64) -> impl Iterator<Item = (f64, f64)> {
        self.groups.iter().map(move |&(mean, variance)| (mean, 1.0 / (variance + epsilon).sqrt()))
    }
}
