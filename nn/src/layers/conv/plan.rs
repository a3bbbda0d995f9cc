//! In which pieces, and on which threads, images are gone through.

use crate::kernels::{Real, Threads, output};
use rayon::prelude::*;

/// Numbers of one thread's images: half a megabyte of `f32`, within an L2 cache.
const OWN: usize = 1 << 17;
/// Numbers of images that all threads work on.
const SHARED: usize = 1 << 20;
/// Into how many parts the images are split where each thread has its own; each has a gradient of
/// the weight, and these are added in order.
const PARTS: usize = 16;

/// Each thread takes images of its own where there are enough, else all share each product. Which
/// of the two, and how many images, follows from the shapes alone, and so does every sum's order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Images at a time.
    pub(super) images: usize,
    /// Images of a part, a multiple of the former.
    pub(super) part: usize,
    /// Inside a part.
    pub(super) threads: Threads,
}

impl Plan {
    /// For `images` of which each is worked on in memory for `image` numbers, and is `numbers`
    /// before and after. Each part of them has a gradient of `weights` numbers.
    pub(super) fn new(image: usize, weights: usize, numbers: usize, images: usize) -> Self {
        let image = image.max(1);
        let own = (OWN / image).max(1);
        let chunks = images.div_ceil(own);
        // More than the images themselves would take longer than what the split saves.
        let are_small = PARTS * weights <= images * numbers;
        if image <= 2 * OWN && chunks >= PARTS && are_small {
            return Self { images: own, part: chunks.div_ceil(PARTS) * own, threads: Threads::One };
        }
        let shared = (SHARED / image).clamp(1, images.max(1));
        Self { images: shared, part: images.max(1), threads: Threads::All }
    }
}

/// Calls `f` with each job and its number.
pub(super) fn each<J: Send>(threads: Threads, jobs: Vec<J>, f: impl Fn((usize, J)) + Send + Sync) {
    match threads {
        Threads::One => jobs.into_iter().enumerate().for_each(f),
        Threads::All => jobs.into_par_iter().enumerate().for_each(f),
    }
}

/// Calls `f` for each run of `len` elements.
pub(super) fn each_run<T: Real>(
    threads: Threads,
    data: &mut [T],
    len: usize,
    f: impl Fn((usize, &mut [T])) + Send + Sync,
) {
    match threads {
        Threads::One => data.chunks_mut(len).enumerate().for_each(f),
        Threads::All => data.par_chunks_mut(len).enumerate().for_each(f),
    }
}

/// The first `len` elements, whatever they are.
pub(super) fn sized<T: Real>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        *buffer = output(len, |_| ());
    }
    &mut buffer[..len]
}
