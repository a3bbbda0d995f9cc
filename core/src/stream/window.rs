//! How far a producer may run ahead of its consumer. Pure.
//!
//! Values are numbered from 0, in every attempt alike, so what is granted to a lost producer holds
//! for the next one.
//!
//! * `W-1`: no more than `size` values have arrived and were not taken.
//! * `W-2`: when all that arrived was taken, the producer may send at least one more.
//! * `W-3`: a value is new once, whatever the number of attempts.

/// The account of one stream.
#[derive(Debug)]
pub(crate) struct Window {
    size: u64,
    arrived: u64,
    taken: u64,
    granted: u64,
}

impl Window {
    /// For a consumer that may be `size` values behind, at least 1.
    pub(crate) fn new(size: usize) -> Self {
        let size = (size as u64).max(1);
        Self { size, arrived: 0, taken: 0, granted: size }
    }

    /// The value of this number has arrived. `false`: an earlier attempt had sent it.
    pub(crate) fn arrive(&mut self, number: u64) -> bool {
        let is_new = number == self.arrived;
        self.arrived += u64::from(is_new);
        is_new
    }

    /// The number of the next new value.
    pub(crate) fn arrived(&self) -> u64 {
        self.arrived
    }

    /// The consumer takes a value. If that makes it worth a message: the new grant. Half a window
    /// at once is.
    pub(crate) fn take(&mut self) -> Option<u64> {
        self.taken += 1;
        let grant = self.taken + self.size;
        let is_due = grant - self.granted >= self.size.div_ceil(2);
        is_due.then(|| {
            self.granted = grant;
            grant
        })
    }

    /// The producer may send values below this number.
    pub(crate) fn granted(&self) -> u64 {
        self.granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn grants_come_half_a_window_at_once() {
        let mut window = Window::new(4);
        assert_eq!(window.granted(), 4);
        (0..4).for_each(|number| assert!(window.arrive(number)));
        assert_eq!([(); 4].map(|()| window.take()), [None, Some(6), None, Some(8)]);
    }

    #[test]
    fn what_an_earlier_attempt_sent_is_not_new() {
        let mut window = Window::new(4);
        assert!(window.arrive(0) && window.arrive(1));
        let again: Vec<bool> = (0..4).map(|number| window.arrive(number)).collect();
        assert_eq!(again, [false, false, true, true]);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Send,
        HearGrant,
        Take,
        Lose,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Send),
            3 => Just(Step::HearGrant),
            4 => Just(Step::Take),
            1 => Just(Step::Lose),
        ]
    }

    proptest! {
        #[test]
        fn a_producer_neither_runs_ahead_nor_stops(
            size in 1_usize..20,
            steps in prop::collection::vec(step(), 0..400),
        ) {
            let mut window = Window::new(size);
            // What the producer knows: grants reach it late, or never if it is lost.
            let (mut next, mut known, mut under_way) = (0, window.granted(), None);
            let mut new = 0;
            let mut taken = 0;
            for step in steps {
                match step {
                    Step::Send if next < known => {
                        new += u64::from(window.arrive(next));
                        next += 1;
                    }
                    Step::HearGrant => known = under_way.take().unwrap_or(known),
                    Step::Take if taken < new => {
                        taken += 1;
                        under_way = window.take().or(under_way);
                    }
                    Step::Lose => (next, known, under_way) = (0, window.granted(), None),
                    _ => {}
                }
                prop_assert!(new - taken <= size as u64, "W-1");
                prop_assert_eq!(new, window.arrived(), "W-3");
                if taken == new {
                    prop_assert!(window.granted() > window.arrived(), "W-2");
                }
            }
        }
    }
}
