//! What is known of a library's plans: made once for each task, proven or not, and whether the library is used at all.

use std::collections::{HashMap, VecDeque};

use super::super::tasks::{Standing, Task, Verdict};

/// Plans that are kept; an edit has about 40.
const MOST: usize = 256;

/// Plans of the type `P`.
pub struct Ledger<P> {
    /// None are tasks that the library has refused.
    plans: HashMap<Task, Option<(P, Standing)>>,
    /// The tasks, the oldest first.
    order: VecDeque<Task>,
    /// Why the library is not used any more.
    off: Option<String>,
}

impl<P> Default for Ledger<P> {
    fn default() -> Self {
        Self { plans: HashMap::new(), order: VecDeque::new(), off: None }
    }
}

impl<P> Ledger<P> {
    /// What a task's plan is worth, which is made if it is new; none if there is none. `made` is given the oldest plan if there are
    /// too many of them, to be dropped when nothing runs by it any more.
    pub fn standing(&mut self, task: &Task, make: impl FnOnce(Option<P>) -> Option<P>) -> Option<Standing> {
        if self.off.is_some() {
            return None;
        }
        if !self.plans.contains_key(task) {
            let oldest = if self.order.len() < MOST { None } else { self.order.pop_front() };
            let oldest = oldest.and_then(|task| self.plans.remove(&task)).flatten().map(|(plan, _)| plan);
            self.plans.insert(*task, make(oldest).map(|plan| (plan, Standing::Unproven)));
            self.order.push_back(*task);
        }
        self.plans.get(task)?.as_ref().map(|(_, standing)| *standing)
    }

    /// A task's plan, while the library is used.
    pub fn plan(&self, task: &Task) -> Option<&P> {
        if self.off.is_some() {
            return None;
        }
        self.plans.get(task)?.as_ref().map(|(plan, _)| plan)
    }

    /// Notes how a result of a task's plan compared with ours; true if the library is not used any more because of it.
    pub fn judge(&mut self, task: &Task, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Agrees => {
                if let Some(Some((_, standing))) = self.plans.get_mut(task) {
                    *standing = Standing::Proven;
                }
                false
            }
            Verdict::Unknown => false,
            Verdict::Differs(apart) => {
                self.switch_off(format!("its result of {task:?} differs from ours by {apart} of its size"))
            }
        }
    }

    /// True if the library was used until now.
    pub fn switch_off(&mut self, reason: String) -> bool {
        let first = self.off.is_none();
        self.off.get_or_insert(reason);
        first
    }

    /// Why the library is not used any more.
    pub fn off(&self) -> Option<&str> {
        self.off.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tasks::Convolution;
    use candle_core::DType;

    fn task(height: usize) -> Task {
        let dtype = DType::BF16;
        let (rows, columns) = ([1, 1], [1, 1]);
        let (batch, channels, width, outputs, kernel, stride) = (1, 8, 8, 8, 3, 1);
        Task::Convolution(Convolution { dtype, batch, channels, height, width, outputs, kernel, stride, rows, columns })
    }

    #[test]
    fn a_plan_is_made_once_and_proven_by_a_comparison() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.standing(&task(8), |_| Some(1)), Some(Standing::Unproven));
        assert_eq!(ledger.standing(&task(8), |_| panic!("made twice")), Some(Standing::Unproven));
        assert!(!ledger.judge(&task(8), Verdict::Unknown));
        assert_eq!(ledger.standing(&task(8), |_| None), Some(Standing::Unproven));
        assert!(!ledger.judge(&task(8), Verdict::Agrees));
        assert_eq!((ledger.standing(&task(8), |_| None), ledger.plan(&task(8))), (Some(Standing::Proven), Some(&1)));
    }

    #[test]
    fn what_is_refused_is_not_asked_again() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.standing(&task(8), |_| None), None);
        assert_eq!(ledger.standing(&task(8), |_| Some(1)), None);
        assert_eq!(ledger.standing(&task(9), |_| Some(2)), Some(Standing::Unproven));
        assert_eq!((ledger.plan(&task(8)), ledger.plan(&task(9))), (None, Some(&2)));
    }

    #[test]
    fn a_difference_or_an_error_ends_the_use_of_all_plans() {
        let mut ledger = Ledger::default();
        for height in [10, 11] {
            ledger.standing(&task(height), |_| Some(height));
        }
        assert!(ledger.judge(&task(10), Verdict::Differs(0.5)), "the first time it is news");
        assert!(!ledger.switch_off("another".into()), "the first reason stays");
        assert!(ledger.off().is_some_and(|reason| reason.contains("height: 10") && reason.contains("0.5")));
        assert_eq!((ledger.standing(&task(11), |_| Some(1)), ledger.plan(&task(11))), (None, None));
    }

    #[test]
    fn the_oldest_plans_make_room() {
        let mut ledger = Ledger::default();
        let mut forgotten = Vec::new();
        for i in 0..MOST + 3 {
            ledger.standing(&task(8 + i), |oldest| {
                forgotten.extend(oldest);
                Some(i)
            });
        }
        assert_eq!(forgotten, [0, 1, 2]);
        assert_eq!((ledger.plan(&task(10)), ledger.plan(&task(11))), (None, Some(&3)));
        assert_eq!(ledger.plans.len(), MOST);
    }
}
