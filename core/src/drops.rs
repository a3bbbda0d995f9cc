//! Dropping without a deep stack. What owns others of its kind, as one result owns the arguments
//! that it was made of, would drop them inside its own drop, and they theirs, however long the chain.

use std::any::Any;
use std::cell::RefCell;

thread_local! {
    /// What waits for its turn, while this thread drops something.
    static WAITING: RefCell<Option<Vec<Box<dyn Any>>>> = const { RefCell::new(None) };
}

/// Drops a value: at once, or, inside such a drop, when that is done.
pub(crate) fn in_turn(value: impl Any) {
    let mut value: Option<Box<dyn Any>> = Some(Box::new(value));
    let begins = WAITING.try_with(|waiting| match &mut *waiting.borrow_mut() {
        Some(queue) => {
            queue.extend(value.take());
            false
        }
        empty => {
            *empty = Some(Vec::new());
            true
        }
    });
    // A thread that is ending has no queue any more, and drops what it has here and now.
    if begins == Ok(true) {
        let _end = End;
        drop(value);
        while let Some(next) = pop() {
            drop(next);
        }
    }
}

fn pop() -> Option<Box<dyn Any>> {
    WAITING.with_borrow_mut(|queue| queue.as_mut()?.pop())
}

/// After a panic too, the next drop of this thread begins anew.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        let rest = WAITING.try_with(|waiting| waiting.borrow_mut().take());
        drop(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::in_turn;
    use std::cell::Cell;
    use std::rc::Rc;

    struct Link(Option<Box<Self>>, Rc<Cell<usize>>);

    impl Drop for Link {
        fn drop(&mut self) {
            self.1.set(self.1.get() + 1);
            in_turn(self.0.take());
        }
    }

    #[test]
    fn a_chain_of_any_length_is_dropped_at_once() {
        let dropped = Rc::new(Cell::new(0));
        let chain = |length| {
            (0..length).fold(None, |next, _| Some(Box::new(Link(next, Rc::clone(&dropped)))))
        };
        drop(chain(1_000_000));
        assert_eq!(dropped.get(), 1_000_000);
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("on purpose");
            }
        }
        assert!(std::panic::catch_unwind(|| in_turn(Bomb)).is_err());
        drop(chain(3));
        assert_eq!(dropped.get(), 1_000_003, "a panic has not stopped it for good");
    }
}
