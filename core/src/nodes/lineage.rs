//! How values that were lost with their machine are made again: by the tasks that made them, whose
//! arguments may have been lost too, and so on. The first of them runs first, and nothing recurses.

use super::object::Far;
use crate::ObjectRef;
use crate::parcel::Parcel;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::Arc;

/// So many tasks in a row are run again for who asks for one value; who asks for more is refused.
pub(super) const DEPTH: usize = 1000;

/// How a value can be made again.
pub(crate) struct Recipe {
    args: Vec<Parcel>,
    run: Run,
}

type Run = Box<dyn Fn(&[Parcel]) -> Option<ObjectRef<Parcel>> + Send + Sync>;

impl Recipe {
    /// By a task with these arguments. `None` where that may not be run any more.
    pub(crate) fn new(
        args: Vec<Parcel>,
        run: impl Fn(&[Parcel]) -> Option<ObjectRef<Parcel>> + Send + Sync + 'static,
    ) -> Self {
        Self { args, run: Box::new(run) }
    }

    pub(super) fn run(&self) -> Option<ObjectRef<Parcel>> {
        (self.run)(&self.args)
    }

    /// Its arguments that are lost, and of which nobody has said yet what becomes of them.
    pub(super) fn lost_inputs(&self) -> Vec<Arc<Far>> {
        self.args.iter().filter_map(lost).collect()
    }
}

/// What is lost of a value, which may have been made again, and lost again.
fn lost(parcel: &Parcel) -> Option<Arc<Far>> {
    let mut parcel = parcel.clone();
    while let Parcel::Far(far) = parcel {
        if !far.is_gone() {
            return None;
        }
        match far.made() {
            Some(made) => parcel = made,
            None => return (!far.is_settled()).then_some(far),
        }
    }
    None
}

/// What must be made again for a value, each after what it is made of; or how many tasks in a row
/// that would be, if they are too many.
pub(super) fn order(root: &Arc<Far>) -> Result<Vec<Arc<Far>>, usize> {
    in_order(Arc::clone(root), DEPTH, Arc::as_ptr, |far| far.lost_inputs())
}

/// The nodes of a graph without circles that can be reached, each after its inputs; or the length
/// of the longest path, if it has more nodes than `most`.
fn in_order<T, K: Copy + Eq + Hash>(
    root: T,
    most: usize,
    key: impl Fn(&T) -> K,
    inputs: impl Fn(&T) -> Vec<T>,
) -> Result<Vec<T>, usize> {
    enum Visit<T, K> {
        Enter(T),
        Leave(T, Vec<K>),
    }
    let (mut order, mut stack) = (Vec::new(), vec![Visit::Enter(root)]);
    // The longest path to each that was entered; 0 until it is known.
    let mut lengths: HashMap<K, usize> = HashMap::new();
    let mut longest = 0;
    while let Some(visit) = stack.pop() {
        match visit {
            Visit::Enter(node) => {
                if let Entry::Vacant(new) = lengths.entry(key(&node)) {
                    new.insert(0);
                    let inputs = inputs(&node);
                    stack.push(Visit::Leave(node, inputs.iter().map(&key).collect()));
                    stack.extend(inputs.into_iter().map(Visit::Enter));
                }
            }
            Visit::Leave(node, inputs) => {
                let length = 1 + inputs.iter().map(|input| lengths[input]).max().unwrap_or(0);
                lengths.insert(key(&node), length);
                longest = longest.max(length);
                order.push(node);
            }
        }
    }
    if longest > most { Err(longest) } else { Ok(order) }
}

#[cfg(test)]
mod tests {
    use super::in_order;

    fn ordered(root: usize, most: usize, inputs: &[&[usize]]) -> Result<Vec<usize>, usize> {
        in_order(root, most, |node| *node, |node| inputs[*node].to_vec())
    }

    #[test]
    fn inputs_come_first_and_once() {
        // 3 is made of 1 and 2, and both of 0; 2 is also made of 1.
        let diamond: &[&[usize]] = &[&[], &[0], &[0, 1], &[1, 2], &[]];
        assert_eq!(ordered(3, 4, diamond), Ok(vec![0, 1, 2, 3]));
        assert_eq!(ordered(4, 1, diamond), Ok(vec![4]));
    }

    #[test]
    fn the_longest_way_counts() {
        let diamond: &[&[usize]] = &[&[], &[0], &[0, 1], &[1, 2, 0]];
        assert_eq!(ordered(3, 3, diamond), Err(4));
        let chain =
            |length| in_order(length, 1000, |n| *n, |n| (1..*n).last().into_iter().collect());
        assert_eq!(chain(1000).map(|order| order.len()), Ok(1000));
        assert_eq!(chain(5_000).map(|order| order.len()), Err(5_000));
    }
}
