/// How the transformer does with less memory; by default it saves none. The result is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Saving {
    /// Blocks that stay in the device's memory, the double ones first; the others come to it at each step, each while the one before
    /// it computes. All stay if none is said.
    pub resident_blocks: Option<usize>,
    /// Whether those others stay in the host's memory, where the device has another, instead of being read from their files.
    pub blocks_on_host: bool,
    /// Tokens that an MLP takes at a time: its inside has four times as many channels as a token. All if none is said.
    pub mlp_tokens: Option<usize>,
}
