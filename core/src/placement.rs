//! Placement groups: resources taken together, for tasks and actors that belong together.

use crate::runtime::{Lease, Request, Runtime};
use crate::scheduler::{NodeId, PlacementStrategy};
use crate::task::Placement;
use crate::{Error, Resources};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// What a placement group asks for. Every default is here.
#[derive(Clone, Debug)]
pub struct PlacementGroupOptions {
    /// Its name in errors.
    pub name: String,
    /// The resources of each bundle.
    pub bundles: Vec<Resources>,
    /// How the bundles are laid out over the nodes. Default: pack.
    pub strategy: PlacementStrategy,
    /// How long to wait for resources that others hold. Default: 10 minutes.
    pub placement_timeout: Duration,
}

impl PlacementGroupOptions {
    /// These bundles under this name.
    pub fn new(name: impl Into<String>, bundles: Vec<Resources>) -> Self {
        Self {
            name: name.into(),
            bundles,
            strategy: PlacementStrategy::default(),
            placement_timeout: Duration::from_secs(600),
        }
    }

    /// The same, laid out so.
    pub fn with_strategy(self, strategy: PlacementStrategy) -> Self {
        Self { strategy, ..self }
    }
}

/// Bundles of resources that were taken together, all or none, and are held until this is
/// dropped. What runs in a bundle takes its resources from there, and from nowhere else.
///
/// ```
/// use mobula_core::{PlacementGroupOptions, Resources, Runtime, Task, TaskOptions};
///
/// let runtime = Runtime::local(Resources::cpus(4.0))?;
/// let bundles = vec![Resources::cpus(1.0), Resources::cpus(2.0)];
/// let group = runtime.placement_group(&PlacementGroupOptions::new("pair", bundles))?;
/// assert_eq!(runtime.free_resources().cpus, 1.0);
/// let options = TaskOptions { bundle: Some(group.bundle(0)?), ..TaskOptions::default() };
/// let task = Task::new("inside", || Ok::<_, String>(1)).with_options(options);
/// assert_eq!(*runtime.submit(task).get()?, 1);
/// # Ok::<(), mobula_core::Error>(())
/// ```
#[derive(Debug)]
pub struct PlacementGroup {
    name: String,
    runtime: Runtime,
    bundles: Vec<Bundle>,
    _lease: Arc<Lease>,
}

/// One bundle of a placement group, to be named in the options of a task or an actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle(pub(crate) NodeId);

/// A machine of this runtime, to be named in the options of a task or an actor; see
/// [`Runtime::nodes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Node(pub(crate) NodeId);

impl Node {
    /// The driver's own machine, the only one that threads run on.
    pub const HERE: Self = Self(NodeId::HERE);

    /// Where something of this placement may go, if nobody has said.
    pub(crate) fn for_placement(placement: Placement) -> Option<Self> {
        (placement == Placement::Thread).then_some(Self::HERE)
    }
}

impl std::fmt::Display for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "node {}", self.0.0)
    }
}

/// What is known of a machine.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct NodeInfo {
    /// How it is named in options.
    pub node: Node,
    /// The name of its host.
    pub host: String,
    /// All that it has.
    pub total: Resources,
    /// What of it is free now.
    pub free: Resources,
}

impl Runtime {
    /// Waits until all bundles can be had, and takes them together: two groups never hold half of
    /// what the other one needs. Errors when they can never be had.
    pub fn placement_group(
        &self,
        options: &PlacementGroupOptions,
    ) -> Result<PlacementGroup, Error> {
        let request = Request {
            bundles: options.bundles.clone(),
            strategy: options.strategy,
            ..Request::single(&options.name.as_str().into(), &Resources::default())
        };
        let lease = self.lease(request, options.placement_timeout)?;
        let bundles = lease.grants.iter().map(|grant| Bundle(self.open_bundle(grant))).collect();
        Ok(PlacementGroup {
            name: options.name.clone(),
            runtime: self.clone(),
            bundles,
            _lease: lease,
        })
    }
}

impl PlacementGroup {
    /// The bundle at this place of the list that was asked for.
    pub fn bundle(&self, index: usize) -> Result<Bundle, Error> {
        let (group, bundles) = (&self.name, self.bundles.len());
        let missing = || Error::NoSuchBundle { group: group.clone(), index, bundles };
        self.bundles.get(index).copied().ok_or_else(missing)
    }
}

impl Drop for PlacementGroup {
    /// What waits for a bundle is refused; what runs in one is left to finish.
    fn drop(&mut self) {
        self.bundles.iter().for_each(|bundle| self.runtime.close_bundle(bundle.0));
    }
}
