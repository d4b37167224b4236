//! Image files and pixels: reading, resizing, tensors, writing, and the parameters stored inside an image.
//!
//! Pictures are 8-bit sRGB [`image::RgbImage`]s everywhere outside the tensors.

mod jpeg;
mod metadata;
mod pixels;
mod read;
mod resize;
mod webp;
mod write;

pub use image::RgbImage;
pub use metadata::read_parameters;
pub use pixels::{from_tensor, sha256, to_tensor, to_unit};
pub use read::{MAX_PIXELS, READABLE_FORMATS, is_image, read_image, read_image_up_to};
pub use resize::resize;
pub(crate) use write::write_whole;
pub use write::{OutputFormat, check_writable, encode, write_atomically};
