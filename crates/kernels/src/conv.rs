//! What a convolution sees of its input.

use std::ops::Range;

/// The pixels of the input that make one pixel of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// The same pixel: 1x1.
    Point,
    /// The same pixel and those around it: 3x3, padded by one zero on each side.
    Same,
    /// 3x3 at every second pixel, padded by one zero to the right and below: half the size.
    Halving,
    /// As `Same`, over the input with each pixel repeated twice in each direction: twice the size.
    Doubling,
}

impl Window {
    /// Weights along each side.
    pub fn kernel(self) -> usize {
        if self == Self::Point { 1 } else { 3 }
    }

    /// The height (or width) of the output for that of the input.
    pub fn out_size(self, size: usize) -> usize {
        match self {
            Self::Point | Self::Same => size,
            Self::Halving => size / 2,
            Self::Doubling => 2 * size,
        }
    }

    /// The row (or column), of `size`, that weight `tap` meets for the output's row (or column) `out`; none is padding.
    pub fn source(self, out: usize, tap: usize, size: usize) -> Option<usize> {
        let source = match self {
            Self::Point => Some(out),
            Self::Same => (out + tap).checked_sub(1),
            Self::Halving => Some(2 * out + tap),
            Self::Doubling => (out + tap).checked_sub(1).map(|source| source / 2),
        };
        source.filter(|&source| source < size)
    }

    /// What makes the output's rows `out` of an input of `size` rows: the input's rows that they meet, and how many rows
    /// of the output of these alone come before.
    pub fn reach(self, out: Range<usize>, size: usize) -> (Range<usize>, usize) {
        let met = |row: usize| (0..self.kernel()).filter_map(move |tap| self.source(row, tap, size));
        let first = met(out.start).min().unwrap_or_default();
        let end = met(out.end.saturating_sub(1)).max().map_or(size, |last| last + 1);
        (first..end, out.start - self.out_size(first))
    }
}
