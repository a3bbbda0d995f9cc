//! Which gradients travel together, and when a bucket is full. Knows nothing of threads.

use std::ops::Range;

/// Bytes of the first bucket, at most: so that the sums begin early.
const FIRST: usize = 1 << 20;

/// Which parameters travel together, by their places among the gradients.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) buckets: Vec<Vec<usize>>,
}

impl Plan {
    /// In this order, of gradients that are so long.
    pub(super) fn of(order: &[usize], lens: &[usize], bytes: usize) -> Self {
        let (mut buckets, mut room) = (Vec::<Vec<usize>>::new(), 0);
        for place in order {
            let need = lens[*place] * size_of::<f32>();
            match buckets.last_mut() {
                Some(bucket) if need <= room => bucket.push(*place),
                _ => {
                    room = if buckets.is_empty() { bytes.min(FIRST) } else { bytes };
                    buckets.push(vec![*place]);
                }
            }
            room = room.saturating_sub(need);
        }
        Self { buckets }
    }
}

/// A pass that fills buckets: which gradients are final, and which buckets are full.
#[derive(Debug)]
pub(super) struct Filling {
    /// Of each place: its bucket, and where in it.
    spots: Vec<(usize, Range<usize>)>,
    /// Of each place: how often it is still to be written; 0 where that is not known.
    left: Vec<u32>,
    is_final: Vec<bool>,
    /// Of each bucket: places that are not final.
    open: Vec<usize>,
    /// The next bucket to be sent.
    next: usize,
    /// A place that was written once more when its bucket had been sent.
    pub(super) late: Option<usize>,
    buckets: Vec<Vec<f32>>,
}

impl Filling {
    pub(super) fn of(
        plan: &Plan,
        lens: &[usize],
        writes: Vec<u32>,
        mut buckets: Vec<Vec<f32>>,
    ) -> Self {
        let mut spots = vec![(0, 0..0); lens.len()];
        buckets.resize_with(plan.buckets.len(), Vec::new);
        for (at, (places, bucket)) in plan.buckets.iter().zip(&mut buckets).enumerate() {
            let mut end = 0;
            for place in places {
                spots[*place] = (at, end..end + lens[*place]);
                end += lens[*place];
            }
            bucket.resize(end, 0.0);
        }
        let (is_final, open) =
            (vec![false; lens.len()], plan.buckets.iter().map(Vec::len).collect());
        Self { spots, left: writes, is_final, open, next: 0, late: None, buckets }
    }

    /// A place was written, and holds these values. Gives the buckets that are full now.
    pub(super) fn written(&mut self, place: usize, values: &[f32]) -> Vec<(usize, Vec<f32>)> {
        if self.spots[place].0 < self.next {
            self.late.get_or_insert(place);
        }
        let is_last = self.left[place] == 1;
        self.left[place] = self.left[place].saturating_sub(1);
        match is_last || self.is_final[place] {
            true => self.put(place, values),
            false => Vec::new(),
        }
    }

    /// The pass is over: all that is left, of all values.
    pub(super) fn rest(
        &mut self,
        places: &[Range<usize>],
        values: &[f32],
    ) -> Vec<(usize, Vec<f32>)> {
        let left = (0..places.len()).filter(|place| !self.is_final[*place]).collect::<Vec<_>>();
        left.into_iter().flat_map(|at| self.put(at, &values[places[at].clone()])).collect()
    }

    fn put(&mut self, place: usize, values: &[f32]) -> Vec<(usize, Vec<f32>)> {
        let (bucket, spot) = self.spots[place].clone();
        if bucket < self.next {
            return Vec::new();
        }
        self.buckets[bucket][spot].copy_from_slice(values);
        if !std::mem::replace(&mut self.is_final[place], true) {
            self.open[bucket] -= 1;
        }
        let first = self.next;
        while self.open.get(self.next) == Some(&0) {
            self.next += 1;
        }
        (first..self.next).map(|at| (at, std::mem::take(&mut self.buckets[at]))).collect()
    }
}

pub(super) fn counts(log: &[usize], places: usize) -> Vec<u32> {
    let mut counts = vec![0; places];
    log.iter().for_each(|place| counts[*place] += 1);
    counts
}

/// Places in the order in which they became final; behind them those that were not written.
pub(super) fn last_first(log: &[usize], places: usize) -> impl Iterator<Item = usize> {
    let mut last = vec![usize::MAX; places];
    log.iter().enumerate().for_each(|(at, place)| last[*place] = at);
    let mut order: Vec<_> = (0..places).collect();
    order.sort_by_key(|place| last[*place]);
    order.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is written how often, and in which order: every gradient travels once, in the buckets'
        /// order, with what it was at the end of the pass, unless it is said to be late.
        #[test]
        fn each_gradient_travels_once(
            lens in prop::collection::vec(0usize..40, 1..12),
            bytes in 1usize..300,
            before in prop::collection::vec(0usize..12, 0..30),
            now in prop::collection::vec(0usize..12, 0..30),
            same in any::<bool>(),
        ) {
            let places = lens.len();
            let within = |log: Vec<usize>| log.into_iter().map(|at| at % places).collect::<Vec<_>>();
            let before = within(before);
            let now = if same { before.clone() } else { within(now) };
            let order: Vec<_> = last_first(&before, places).collect();
            let plan = Plan::of(&order, &lens, bytes);
            let mut travel = plan.buckets.concat();
            for (at, bucket) in plan.buckets.iter().enumerate() {
                let size = bucket.iter().map(|place| lens[*place] * 4).sum::<usize>();
                let most = if at == 0 { bytes.min(FIRST) } else { bytes };
                prop_assert!(size <= most || bucket.iter().filter(|p| lens[**p] > 0).count() == 1);
            }
            travel.sort_unstable();
            prop_assert!(travel.into_iter().eq(0..places));

            let mut ends = 0;
            let ranges: Vec<_> = lens.iter().map(|len| { ends += len; ends - len..ends }).collect();
            let mut values = vec![0f32; ends];
            let mut filling = Filling::of(&plan, &lens, counts(&before, places), Vec::new());
            let mut sent = Vec::new();
            for place in &now {
                values[ranges[*place].clone()].iter_mut().for_each(|value| *value += 1.0);
                sent.extend(filling.written(*place, &values[ranges[*place].clone()]));
            }
            sent.extend(filling.rest(&ranges, &values));
            prop_assert!(sent.iter().map(|(at, _)| *at).eq(0..plan.buckets.len()));
            prop_assert!(!same || filling.late.is_none());
            for (at, bucket) in sent {
                let expected = plan.buckets[at].iter().flat_map(|p| &values[ranges[*p].clone()]);
                let is_same = bucket.iter().eq(expected);
                prop_assert!(is_same || filling.late.is_some());
            }
        }
    }

    #[test]
    fn the_first_bucket_is_small_and_full_ones_go_at_once() {
        let lens = [300_000, 10, 10, 2_000_000, 5];
        let plan = Plan::of(&[4, 2, 1, 0, 3], &lens, 25 << 20);
        assert_eq!(plan.buckets, [vec![4, 2, 1], vec![0, 3]]);
        let mut filling = Filling::of(&plan, &lens, vec![1, 2, 1, 1, 1], Vec::new());
        assert!(filling.written(4, &[1.0; 5]).is_empty());
        assert!(filling.written(2, &[2.0; 10]).is_empty());
        assert!(filling.written(1, &[3.0; 10]).is_empty(), "once more to come");
        let sent = filling.written(1, &[4.0; 10]);
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].1, [vec![1.0; 5], vec![2.0; 10], vec![4.0; 10]].concat());
        filling.written(2, &[9.0; 10]);
        assert_eq!(filling.late, Some(2));
    }
}
