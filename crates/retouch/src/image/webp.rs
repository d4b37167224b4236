//! The chunks of a WebP file (RIFF: a name, a length, so many bytes, and one more where their number is odd).
//!
//! The decoder in use takes the length of a metadata chunk on trust, and makes room for up to 4 GB before it reads.
//! Source: RFC 9649, section 2.

/// Whether all chunks that the file claims to have are in it.
pub fn is_whole(bytes: &[u8]) -> bool {
    let length = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?) as usize);
    let Some(end) = length(4).map(|length| length.saturating_add(8)) else { return false };
    let mut position = 12;
    // The last byte may be missing where it is the one that makes the number even.
    while position + 8 <= end.min(bytes.len()) {
        let Some(length) = length(position + 4) else { return false };
        position = position.saturating_add(8).saturating_add(length);
        if position > bytes.len() {
            return false;
        }
        position += position % 2;
    }
    end <= bytes.len() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{read_image, read_parameters};

    /// A picture that begins a file in the extended form, and a chunk of EXIF.
    fn with_exif(claimed: u32, exif: &[u8]) -> Vec<u8> {
        let simple = include_bytes!("../../../../tests/fixtures/images/lossy.webp");
        let picture = &simple[12..];
        let size = image::load_from_memory(simple).unwrap().into_rgb8().dimensions();
        let side = |size: u32| (size - 1).to_le_bytes()[..3].to_vec();
        let extended = [&[8, 0, 0, 0][..], &side(size.0), &side(size.1)].concat();
        let mut chunks = [b"WEBPVP8X", 10_u32.to_le_bytes().as_slice(), &extended, picture].concat();
        chunks.extend([b"EXIF", claimed.to_le_bytes().as_slice(), exif].concat());
        [b"RIFF", ((chunks.len() - exif.len()) as u32 + claimed).to_le_bytes().as_slice(), &chunks].concat()
    }

    #[test]
    fn a_chunk_that_claims_more_than_the_file_has_is_not_believed() {
        let whole = with_exif(4, b"II*\0");
        assert!(is_whole(&whole));
        assert!(read_image(&whole, "photo").is_ok() && read_parameters(&whole, "photo").unwrap().is_none());
        for claimed in [6, 2 << 30, 0xffff_0000] {
            let bomb = with_exif(claimed, b"II*\0");
            assert!(!is_whole(&bomb));
            let refused = read_image(&bomb, "photo").unwrap_err().to_string();
            assert!(refused.contains("truncated WebP"), "{refused}");
            assert!(read_parameters(&bomb, "photo").unwrap().is_none());
        }
    }

    /// What the fuzzer found: 2.8 GB for a file of 2 KB.
    #[test]
    fn a_found_file_is_refused_before_it_is_decoded() {
        let found = include_bytes!("../../../../tests/fixtures/hostile/images/long_chunk.webp");
        assert!(!is_whole(found));
        assert!(read_image(found, "photo").unwrap_err().to_string().contains("truncated WebP"));
        assert!(read_parameters(found, "photo").unwrap().is_none());
    }

    #[test]
    fn a_file_cut_anywhere_is_not_whole() {
        for whole in
            [with_exif(4, b"II*\0"), include_bytes!("../../../../tests/fixtures/images/lossless.webp").to_vec()]
        {
            assert!(is_whole(&whole));
            for length in 0..whole.len() - 1 {
                assert!(!is_whole(&whole[..length]), "{length} of {}", whole.len());
            }
        }
    }
}
