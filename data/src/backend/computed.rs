//! Aggregates that are computed, and not taken from statistics.

use arrow::datatypes::{DataType, FieldRef};
use datafusion::common::{Result as EngineResult, ScalarValue};
use datafusion::execution::FunctionRegistry;
use datafusion::logical_expr::expr::{
    AggregateFunction, AggregateFunctionParams, WindowFunctionParams,
};
use datafusion::logical_expr::function::{
    AccumulatorArgs, AggregateFunctionSimplification, StateFieldsArgs,
};
use datafusion::logical_expr::utils::AggregateOrderSensitivity;
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, Documentation, Expr, GroupsAccumulator, Operator,
    ReversedUDAF, SetMonotonicity, Signature, StatisticsArgs,
};
use std::sync::Arc;

/// Those of the engine that answer from statistics, which are wrong where these know no NaN, are of values
/// that a cast then orders otherwise, or tell of a row that a filter does not find (DataFusion 55.2). Here a
/// rule is left out; schedulers may apply it whatever a session says.
const GUESSED: &[&str] = &["count", "max", "min", "sum"];

/// Has a session compute them.
pub(super) fn register(session: &mut dyn FunctionRegistry) -> EngineResult<()> {
    for name in GUESSED {
        let function = session.udaf(name)?;
        if !function.inner().is::<Computed>() {
            session.register_udaf(Arc::new(Computed(function).into()))?;
        }
    }
    Ok(())
}

/// An aggregate but for its answers from statistics.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Computed(Arc<AggregateUDF>);

impl Computed {
    fn inner(&self) -> &Arc<dyn AggregateUDFImpl> {
        self.0.inner()
    }
}

impl AggregateUDFImpl for Computed {
    fn value_from_stats(&self, _of: &StatisticsArgs<'_>) -> Option<ScalarValue> {
        None
    }

    fn name(&self) -> &str {
        self.inner().name()
    }

    fn aliases(&self) -> &[String] {
        self.inner().aliases()
    }

    fn schema_name(&self, of: &AggregateFunctionParams) -> EngineResult<String> {
        self.inner().schema_name(of)
    }

    fn human_display(&self, of: &AggregateFunctionParams) -> EngineResult<String> {
        self.inner().human_display(of)
    }

    fn window_function_schema_name(&self, of: &WindowFunctionParams) -> EngineResult<String> {
        self.inner().window_function_schema_name(of)
    }

    fn display_name(&self, of: &AggregateFunctionParams) -> EngineResult<String> {
        self.inner().display_name(of)
    }

    fn window_function_display_name(&self, of: &WindowFunctionParams) -> EngineResult<String> {
        self.inner().window_function_display_name(of)
    }

    fn signature(&self) -> &Signature {
        self.inner().signature()
    }

    fn return_type(&self, types: &[DataType]) -> EngineResult<DataType> {
        self.inner().return_type(types)
    }

    fn return_field(&self, fields: &[FieldRef]) -> EngineResult<FieldRef> {
        self.inner().return_field(fields)
    }

    fn is_nullable(&self) -> bool {
        self.inner().is_nullable()
    }

    fn accumulator(&self, of: AccumulatorArgs<'_>) -> EngineResult<Box<dyn Accumulator>> {
        self.inner().accumulator(of)
    }

    fn state_fields(&self, of: StateFieldsArgs<'_>) -> EngineResult<Vec<FieldRef>> {
        self.inner().state_fields(of)
    }

    fn groups_accumulator_supported(&self, of: AccumulatorArgs<'_>) -> bool {
        self.inner().groups_accumulator_supported(of)
    }

    fn create_groups_accumulator(
        &self,
        of: AccumulatorArgs<'_>,
    ) -> EngineResult<Box<dyn GroupsAccumulator>> {
        self.inner().create_groups_accumulator(of)
    }

    fn create_sliding_accumulator(
        &self,
        of: AccumulatorArgs<'_>,
    ) -> EngineResult<Box<dyn Accumulator>> {
        self.inner().create_sliding_accumulator(of)
    }

    fn with_beneficial_ordering(
        self: Arc<Self>,
        is_there: bool,
    ) -> EngineResult<Option<Arc<dyn AggregateUDFImpl>>> {
        self.inner().clone().with_beneficial_ordering(is_there)
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        self.inner().order_sensitivity()
    }

    fn simplify(&self) -> Option<AggregateFunctionSimplification> {
        self.inner().simplify()
    }

    fn simplify_expr_op_literal(
        &self,
        function: &AggregateFunction,
        argument: &Expr,
        operator: Operator,
        literal: &Expr,
        argument_is_left: bool,
    ) -> EngineResult<Option<Expr>> {
        let inner = self.inner();
        inner.simplify_expr_op_literal(function, argument, operator, literal, argument_is_left)
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        self.inner().reverse_expr()
    }

    fn coerce_types(&self, types: &[DataType]) -> EngineResult<Vec<DataType>> {
        self.inner().coerce_types(types)
    }

    fn is_descending(&self) -> Option<bool> {
        self.inner().is_descending()
    }

    fn default_value(&self, data_type: &DataType) -> EngineResult<ScalarValue> {
        self.inner().default_value(data_type)
    }

    fn supports_null_handling_clause(&self) -> bool {
        self.inner().supports_null_handling_clause()
    }

    fn supports_within_group_clause(&self) -> bool {
        self.inner().supports_within_group_clause()
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.inner().documentation()
    }

    fn set_monotonicity(&self, data_type: &DataType) -> SetMonotonicity {
        self.inner().set_monotonicity(data_type)
    }
}
