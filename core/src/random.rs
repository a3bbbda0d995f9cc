//! Counter-based random numbers: every draw is a pure function of (seed, purpose, step, index).
//!
//! Philox4x32-10 from Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3* (SC'11): the
//! same bits on any thread count, any world size and, later, in a CUDA kernel. A resumed run
//! needs no generator state: it asks for the step it is at.

use std::convert::Infallible;

/// The family of random numbers for one purpose, such as `"dropout"` or `"shuffle"`.
///
/// ```
/// use mobula_core::random::Stream;
///
/// let dropout = Stream::new(7, "dropout");
/// assert_eq!(dropout.at(3, 0).uniform(), dropout.at(3, 0).uniform());
/// assert_ne!(dropout.at(3, 0).uniform(), dropout.at(4, 0).uniform());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
}

impl Stream {
    /// The stream of `purpose` under `seed`. Different purposes are independent.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let key = mix(seed ^ mix(fnv1a(purpose.as_bytes())));
        Self { key: [key as u32, (key >> 32) as u32] }
    }

    /// A stream derived from this one, for example per layer or per trial.
    pub fn child(&self, index: u64) -> Self {
        let key = u64::from(self.key[0]) | u64::from(self.key[1]) << 32;
        let key = mix(key ^ mix(index.wrapping_add(0x9e37_79b9_7f4a_7c15)));
        Self { key: [key as u32, (key >> 32) as u32] }
    }

    /// The numbers of one `(step, index)`: up to 2³⁴ 32-bit words.
    pub fn at(&self, step: u64, index: u32) -> Philox {
        Philox {
            key: self.key,
            counter: [0, index, step as u32, (step >> 32) as u32],
            words: [0; 4],
            used: 4,
        }
    }

    /// The Philox key, for kernels that draw the same numbers.
    pub fn key(&self) -> [u32; 2] {
        self.key
    }
}

/// The generator of one `(seed, purpose, step, index)`; implements `rand`'s traits.
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    counter: [u32; 4],
    words: [u32; 4],
    used: usize,
}

impl Philox {
    /// The next 32 random bits.
    pub fn word(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox4x32_10(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// A uniform number in `[0, 1)` with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        let (high, low) = (u64::from(self.word()), u64::from(self.word()));
        ((high << 32 | low) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A uniform `f32` in `[0, 1)` with 24 random bits.
    pub fn uniform_f32(&mut self) -> f32 {
        unit_f32(self.word())
    }

    /// A standard normal number (Box-Muller; two uniforms a draw).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A uniform integer in `0..bound` without modulo bias (Lemire 2019). `bound` must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "Philox::below: the bound must be positive");
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let bits = u64::from(self.word()) << 32 | u64::from(self.word());
            let product = u128::from(bits) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }
}

impl rand::TryRng for Philox {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.word())
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from(self.word()) << 32 | u64::from(self.word()))
    }

    fn try_fill_bytes(&mut self, dst: &mut [u8]) -> Result<(), Infallible> {
        for chunk in dst.chunks_mut(4) {
            chunk.copy_from_slice(&self.word().to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

/// The top 24 bits of a word as a uniform `f32` in `[0, 1)`.
pub fn unit_f32(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
}

/// One block of Philox4x32-10: four words of output for a counter and a key.
#[inline]
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    for round in 0..10 {
        if round > 0 {
            key[0] = key[0].wrapping_add(0x9E37_79B9);
            key[1] = key[1].wrapping_add(0xBB67_AE85);
        }
        let (p0, p1) = (M0 * u64::from(counter[0]), M1 * u64::from(counter[2]));
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
    }
    counter
}

/// The splitmix64 finaliser: a bijection that spreads every bit.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from Random123's `kat_vectors`.
    #[test]
    fn philox_matches_the_reference() {
        let check = |counter, key, expected: [u32; 4]| {
            assert_eq!(philox4x32_10(counter, key), expected);
        };
        check([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        check(
            [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
            [0xa4093822, 0x299f31d0],
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
        );
    }

    #[test]
    fn purposes_steps_and_indices_are_independent() {
        let first = |stream: Stream, step, index| stream.at(step, index).word();
        let base = Stream::new(1, "a");
        let seen = [
            first(base, 0, 0),
            first(base, 0, 1),
            first(base, 1, 0),
            first(base, 1 << 32, 0),
            first(base.child(0), 0, 0),
            first(base.child(1), 0, 0),
            first(Stream::new(1, "b"), 0, 0),
            first(Stream::new(2, "a"), 0, 0),
        ];
        let unique: std::collections::BTreeSet<_> = seen.iter().collect();
        assert_eq!(unique.len(), seen.len(), "{seen:x?}");
    }

    #[test]
    fn draws_have_the_moments_of_their_distributions() {
        let mut rng = Stream::new(3, "moments").at(0, 0);
        let n = 100_000;
        let normal: Vec<f64> = (0..n).map(|_| rng.normal()).collect();
        let mean = normal.iter().sum::<f64>() / n as f64;
        let variance = normal.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");

        let mut counts = [0u32; 7];
        (0..70_000).for_each(|_| counts[rng.below(7) as usize] += 1);
        assert!(counts.iter().all(|c| c.abs_diff(10_000) < 500), "{counts:?}");
    }
}
