//! Between latents and the tokens that the transformer sees, and the tokens' positions.

use candle_core::{Result, Tensor};

/// `[batch, channels, height, width]` latents to `[batch, (height / 2)(width / 2), channels * 4]` tokens.
///
/// A token is a 2x2 patch, its channels in the order channel, row, column (diffusers, `FluxKontextPipeline._pack_latents`).
pub fn pack(latents: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    latents
        .reshape(&[b, c, h / 2, 2, w / 2, 2])?
        .permute([0, 2, 4, 1, 3, 5])? // b, h/2, w/2, c, 2, 2
        .reshape((b, (h / 2) * (w / 2), c * 4))
}

/// The inverse of [`pack`], for latents of `height` x `width`.
pub fn unpack(tokens: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (b, _, c4) = tokens.dims3()?;
    tokens
        .reshape(&[b, height / 2, width / 2, c4 / 4, 2, 2])?
        .permute([0, 3, 1, 4, 2, 5])? // b, c, h/2, 2, w/2, 2
        .reshape((b, c4 / 4, height, width))
}

/// A token's place on the three axes of the rotary embedding: image index, row, column.
pub type Position = [u32; 3];

/// Text tokens all sit at the origin.
pub fn text_positions(tokens: usize) -> Vec<Position> {
    vec![[0, 0, 0]; tokens]
}

/// The positions of a `rows` x `columns` grid of tokens; `image` is 0 for the output and 1 for the reference.
pub fn image_positions(image: u32, rows: usize, columns: usize) -> Vec<Position> {
    (0..rows as u32).flat_map(|row| (0..columns as u32).map(move |column| [image, row, column])).collect()
}
