//! `count` as it is right.

use arrow::datatypes::{DataType, FieldRef};
use datafusion::common::{Result as EngineResult, ScalarValue};
use datafusion::functions_aggregate::count::Count;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::{
    Accumulator, AggregateUDFImpl, Documentation, GroupsAccumulator, ReversedUDAF, SetMonotonicity,
    Signature, StatisticsArgs,
};

/// The engine's, but for what it takes from statistics without counting: behind a filter for one value these
/// say that a column has exactly one, also where no row has it (DataFusion 55.2).
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct RightCount(Count);

impl RightCount {
    pub(super) fn new() -> Self {
        Self(Count::new())
    }
}

impl AggregateUDFImpl for RightCount {
    fn value_from_stats(&self, of: &StatisticsArgs<'_>) -> Option<ScalarValue> {
        (!of.is_distinct).then(|| self.0.value_from_stats(of))?
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn signature(&self) -> &Signature {
        self.0.signature()
    }

    fn return_type(&self, types: &[DataType]) -> EngineResult<DataType> {
        self.0.return_type(types)
    }

    fn is_nullable(&self) -> bool {
        self.0.is_nullable()
    }

    fn state_fields(&self, of: StateFieldsArgs<'_>) -> EngineResult<Vec<FieldRef>> {
        self.0.state_fields(of)
    }

    fn accumulator(&self, of: AccumulatorArgs<'_>) -> EngineResult<Box<dyn Accumulator>> {
        self.0.accumulator(of)
    }

    fn groups_accumulator_supported(&self, of: AccumulatorArgs<'_>) -> bool {
        self.0.groups_accumulator_supported(of)
    }

    fn create_groups_accumulator(
        &self,
        of: AccumulatorArgs<'_>,
    ) -> EngineResult<Box<dyn GroupsAccumulator>> {
        self.0.create_groups_accumulator(of)
    }

    fn create_sliding_accumulator(
        &self,
        of: AccumulatorArgs<'_>,
    ) -> EngineResult<Box<dyn Accumulator>> {
        self.0.create_sliding_accumulator(of)
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        self.0.reverse_expr()
    }

    fn default_value(&self, data_type: &DataType) -> EngineResult<ScalarValue> {
        self.0.default_value(data_type)
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.0.documentation()
    }

    fn set_monotonicity(&self, data_type: &DataType) -> SetMonotonicity {
        self.0.set_monotonicity(data_type)
    }
}
