//! From the host's memory to a GPU's through a few buffers that the GPU reads by itself: while one is on its way, the next is
//! filled.

use candle_core::Result;

/// The buffers, and where they are sent.
pub trait Buffers {
    const COUNT: usize;
    /// Bytes of each.
    const SIZE: usize;

    /// Waits until a buffer has arrived, if it is on its way.
    fn wait(&mut self, buffer: usize) -> Result<()>;

    /// Writes to the beginning of a buffer that is not on its way.
    fn fill(&mut self, buffer: usize, bytes: &[u8]) -> Result<()>;

    /// Sets off with the first `bytes` of a buffer, to `offset` from the beginning of the destination.
    fn send(&mut self, buffer: usize, bytes: usize, offset: usize) -> Result<()>;
}

/// Sends all of `bytes`, the first of them by the buffer `next`, which becomes the one to go on with. The last ones may still be
/// on their way.
pub fn send<B: Buffers>(buffers: &mut B, next: &mut usize, bytes: &[u8]) -> Result<()> {
    for (i, piece) in bytes.chunks(B::SIZE).enumerate() {
        buffers.wait(*next)?;
        buffers.fill(*next, piece)?;
        buffers.send(*next, piece.len(), i * B::SIZE)?;
        *next = (*next + 1) % B::COUNT;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Buffers that arrive as late as they may.
    #[derive(Default)]
    struct Slow {
        buffers: [[u8; 4]; 2],
        /// What is on its way of each: bytes and offset.
        on_the_way: [Option<(usize, usize)>; 2],
        destination: Vec<u8>,
        /// The most that were on their way at a time.
        most: usize,
    }

    impl Buffers for Slow {
        const COUNT: usize = 2;
        const SIZE: usize = 4;

        fn wait(&mut self, buffer: usize) -> Result<()> {
            if let Some((bytes, offset)) = self.on_the_way[buffer].take() {
                self.destination[offset..offset + bytes].copy_from_slice(&self.buffers[buffer][..bytes]);
            }
            Ok(())
        }

        fn fill(&mut self, buffer: usize, bytes: &[u8]) -> Result<()> {
            assert!(self.on_the_way[buffer].is_none(), "buffer {buffer} is filled while it is read");
            self.buffers[buffer][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn send(&mut self, buffer: usize, bytes: usize, offset: usize) -> Result<()> {
            self.on_the_way[buffer] = Some((bytes, offset));
            self.most = self.most.max(self.on_the_way.iter().flatten().count());
            Ok(())
        }
    }

    #[test]
    fn all_bytes_arrive_and_no_buffer_is_filled_on_its_way() -> Result<()> {
        let (mut slow, mut next) = (Slow::default(), 0);
        for count in [0_u8, 1, 3, 4, 5, 8, 9, 23] {
            let bytes: Vec<u8> = (1..=count).collect();
            for buffer in 0..2 {
                slow.wait(buffer)?; // this one has the destination of the call before
            }
            slow.destination = vec![0; bytes.len()];
            send(&mut slow, &mut next, &bytes)?;
            for buffer in 0..2 {
                slow.wait(buffer)?;
            }
            assert_eq!(slow.destination, bytes);
        }
        assert_eq!(slow.most, 2, "the next is filled while one is on its way");
        Ok(())
    }

    #[test]
    fn a_call_goes_on_with_the_buffer_that_was_sent_first() -> Result<()> {
        let (mut slow, mut next) = (Slow::default(), 0);
        slow.destination = vec![0; 12];
        send(&mut slow, &mut next, &[1; 12])?;
        // The third piece went by the first buffer, so that the second is the older one.
        assert_eq!(next, 1);
        assert_eq!(slow.on_the_way, [Some((4, 8)), Some((4, 4))]);
        Ok(())
    }
}
