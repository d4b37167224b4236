/// How the transformer does with less memory; by default it saves none. The result is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Saving {
    /// Blocks that stay in memory, the double ones first; the others are read at each step, each while the one before it
    /// computes. All stay if none is said.
    pub resident_blocks: Option<usize>,
    /// Tokens that an MLP takes at a time: its inside has four times as many channels as a token. All if none is said.
    pub mlp_tokens: Option<usize>,
}
