//! The marker segments of a JPEG file.
//!
//! The decoder in use fills the missing part of a truncated file with grey and says nothing, and neither it nor the
//! encoder knows comments; both need no more than a walk over the markers (ITU-T T.81, annex B).

/// Starts a comment that holds a part of the parameters.
const COMMENT_PREFIX: &[u8] = b"retouch\0";
/// The most that fits into one segment beside its two length bytes.
pub const MAX_SEGMENT: usize = 65533;

struct Segment<'a> {
    marker: u8,
    payload: &'a [u8],
    /// Offset of the first byte after the segment.
    end: usize,
}

/// The segments after the start marker, in order, ending with the end-of-image marker unless that is missing.
fn segments(bytes: &[u8]) -> impl Iterator<Item = Segment<'_>> {
    const END_OF_IMAGE: u8 = 0xd9;
    let mut position = 2;
    let mut ended = false;
    std::iter::from_fn(move || {
        while !ended {
            // Between the segments lies entropy-coded data, in which a marker is never followed by zero.
            position += bytes.get(position..)?.iter().position(|&b| b == 0xff)?;
            let marker = *bytes.get(position + 1)?;
            match marker {
                0xff => position += 1,                      // a fill byte
                0x00 | 0x01 | 0xd0..=0xd8 => position += 2, // stuffing, restarts: no length follows
                END_OF_IMAGE => {
                    ended = true;
                    return Some(Segment { marker, payload: &[], end: position + 2 });
                }
                _ => {
                    let length = bytes.get(position + 2..position + 4)?;
                    let end = position + 2 + usize::from(u16::from_be_bytes([length[0], length[1]]));
                    let payload = bytes.get(position + 4..end)?;
                    position = end;
                    return Some(Segment { marker, payload, end });
                }
            }
        }
        None
    })
}

/// Whether the file goes on to its end marker.
pub fn is_whole(bytes: &[u8]) -> bool {
    segments(bytes).last().is_some_and(|segment| segment.marker == 0xd9)
}

/// The same file with `text` in comments after its application segments, as many as it takes.
pub fn with_text(bytes: &[u8], text: &[u8]) -> Vec<u8> {
    let at = segments(bytes).take_while(|s| (0xe0..=0xef).contains(&s.marker)).last().map_or(2, |s| s.end);
    let (head, tail) = bytes.split_at(at.min(bytes.len()));
    let mut out = head.to_vec();
    for part in text.chunks(MAX_SEGMENT - COMMENT_PREFIX.len()) {
        let length = (2 + COMMENT_PREFIX.len() + part.len()) as u16;
        out.extend([0xff, 0xfe]);
        out.extend(length.to_be_bytes());
        out.extend(COMMENT_PREFIX);
        out.extend(part);
    }
    out.extend(tail);
    out
}

/// What [`with_text`] stored.
pub fn text(bytes: &[u8]) -> Option<Vec<u8>> {
    let parts = segments(bytes).filter(|s| s.marker == 0xfe).filter_map(|s| s.payload.strip_prefix(COMMENT_PREFIX));
    let text = parts.fold(Vec::new(), |mut text, part| {
        text.extend(part);
        text
    });
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jpeg() -> Vec<u8> {
        let mut bytes = Vec::new();
        let image = image::RgbImage::from_fn(40, 24, |x, y| image::Rgb([x as u8 * 6, y as u8 * 9, 77]));
        image::codecs::jpeg::JpegEncoder::new(&mut bytes).encode_image(&image).unwrap();
        bytes
    }

    #[test]
    fn a_file_cut_anywhere_is_not_whole() {
        let whole = jpeg();
        assert!(is_whole(&whole));
        for len in 0..whole.len() {
            assert!(!is_whole(&whole[..len]), "{len} of {} bytes", whole.len());
        }
    }

    #[test]
    fn what_follows_the_end_marker_does_not_matter() {
        let mut bytes = jpeg();
        bytes.extend(b"\xff\xe1 appended by a camera");
        assert!(is_whole(&bytes));
    }

    #[test]
    fn text_longer_than_a_segment_round_trips() {
        let long = "parameters ".repeat(20_000).into_bytes();
        let with = with_text(&jpeg(), &long);
        assert_eq!(text(&with), Some(long));
        assert!(is_whole(&with));
        assert_eq!(text(&jpeg()), None);
        let pixels = |bytes: &[u8]| image::load_from_memory(bytes).unwrap().into_rgb8();
        assert_eq!(pixels(&with), pixels(&jpeg()));
    }
}
