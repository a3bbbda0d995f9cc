//! Plans as bytes.

use super::message;
use crate::dataset_table::DatasetTable;
use crate::functions;
use arrow::datatypes::SchemaRef;
use datafusion::catalog::TableProvider;
use datafusion::common::{Result as EngineResult, TableReference};
use datafusion::datasource::file_format::FileFormatFactory;
use datafusion::execution::TaskContext;
use datafusion::logical_expr::{AggregateUDF, Extension, LogicalPlan, ScalarUDF, WindowUDF};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr_common::physical_expr::proto_decode::PhysicalExprDecodeCtx;
use datafusion::physical_expr_common::physical_expr::proto_encode::PhysicalExprEncodeCtx;
use datafusion::physical_plan::ExecutionPlan;
use datafusion_proto::logical_plan::{DefaultLogicalExtensionCodec, LogicalExtensionCodec};
use datafusion_proto::physical_plan::{
    DefaultPhysicalExtensionCodec, PhysicalExtensionCodec, PhysicalProtoConverterExtension,
};
use std::sync::Arc;

/// Logical plans: datasets among their tables, and functions of the program by name. What it does not know
/// goes to another codec.
#[derive(Debug)]
pub struct LogicalCodec {
    others: Arc<dyn LogicalExtensionCodec>,
}

impl LogicalCodec {
    /// With the codec for what else is in the engine's plans.
    pub fn new(others: Arc<dyn LogicalExtensionCodec>) -> Self {
        Self { others }
    }
}

impl Default for LogicalCodec {
    fn default() -> Self {
        Self::new(Arc::new(DefaultLogicalExtensionCodec {}))
    }
}

impl LogicalExtensionCodec for LogicalCodec {
    fn try_decode(
        &self,
        bytes: &[u8],
        inputs: &[LogicalPlan],
        context: &TaskContext,
    ) -> EngineResult<Extension> {
        self.others.try_decode(bytes, inputs, context)
    }

    fn try_encode(&self, node: &Extension, bytes: &mut Vec<u8>) -> EngineResult<()> {
        self.others.try_encode(node, bytes)
    }

    fn try_decode_table_provider(
        &self,
        bytes: &[u8],
        name: &TableReference,
        schema: SchemaRef,
        context: &TaskContext,
    ) -> EngineResult<Arc<dyn TableProvider>> {
        match message::is_ours(bytes) {
            true => Ok(message::table(bytes)?),
            false => self.others.try_decode_table_provider(bytes, name, schema, context),
        }
    }

    fn try_encode_table_provider(
        &self,
        name: &TableReference,
        table: Arc<dyn TableProvider>,
        bytes: &mut Vec<u8>,
    ) -> EngineResult<()> {
        match table.downcast_ref::<DatasetTable>() {
            Some(table) => bytes.extend(message::of_table(table)?),
            None => self.others.try_encode_table_provider(name, table, bytes)?,
        }
        Ok(())
    }

    fn try_decode_file_format(
        &self,
        bytes: &[u8],
        context: &TaskContext,
    ) -> EngineResult<Arc<dyn FileFormatFactory>> {
        self.others.try_decode_file_format(bytes, context)
    }

    fn try_encode_file_format(
        &self,
        bytes: &mut Vec<u8>,
        format: Arc<dyn FileFormatFactory>,
    ) -> EngineResult<()> {
        self.others.try_encode_file_format(bytes, format)
    }

    fn try_decode_udf(&self, name: &str, bytes: &[u8]) -> EngineResult<Arc<ScalarUDF>> {
        functions::scalar(name).map_or_else(|| self.others.try_decode_udf(name, bytes), Ok)
    }

    fn try_encode_udf(&self, function: &ScalarUDF, bytes: &mut Vec<u8>) -> EngineResult<()> {
        match functions::scalar(function.name()) {
            Some(_) => Ok(()),
            None => self.others.try_encode_udf(function, bytes),
        }
    }

    fn try_decode_udaf(&self, name: &str, bytes: &[u8]) -> EngineResult<Arc<AggregateUDF>> {
        functions::aggregate(name).map_or_else(|| self.others.try_decode_udaf(name, bytes), Ok)
    }

    fn try_encode_udaf(&self, function: &AggregateUDF, bytes: &mut Vec<u8>) -> EngineResult<()> {
        match functions::aggregate(function.name()) {
            Some(_) => Ok(()),
            None => self.others.try_encode_udaf(function, bytes),
        }
    }

    fn try_decode_udwf(&self, name: &str, bytes: &[u8]) -> EngineResult<Arc<WindowUDF>> {
        self.others.try_decode_udwf(name, bytes)
    }

    fn try_encode_udwf(&self, function: &WindowUDF, bytes: &mut Vec<u8>) -> EngineResult<()> {
        self.others.try_encode_udwf(function, bytes)
    }
}

/// The same for physical plans, with what they read of datasets.
#[derive(Debug)]
pub struct PhysicalCodec {
    others: Arc<dyn PhysicalExtensionCodec>,
}

impl PhysicalCodec {
    /// With the codec for what else is in the engine's plans.
    pub fn new(others: Arc<dyn PhysicalExtensionCodec>) -> Self {
        Self { others }
    }
}

impl Default for PhysicalCodec {
    fn default() -> Self {
        Self::new(Arc::new(DefaultPhysicalExtensionCodec {}))
    }
}

impl PhysicalExtensionCodec for PhysicalCodec {
    fn try_decode(
        &self,
        bytes: &[u8],
        inputs: &[Arc<dyn ExecutionPlan>],
        context: &TaskContext,
        converter: &dyn PhysicalProtoConverterExtension,
    ) -> EngineResult<Arc<dyn ExecutionPlan>> {
        match message::is_ours(bytes) {
            true => Ok(message::plan(bytes)?),
            false => self.others.try_decode(bytes, inputs, context, converter),
        }
    }

    fn try_encode(
        &self,
        node: Arc<dyn ExecutionPlan>,
        bytes: &mut Vec<u8>,
        converter: &dyn PhysicalProtoConverterExtension,
    ) -> EngineResult<()> {
        match message::of_plan(&*node)? {
            Some(ours) => bytes.extend(ours),
            None => self.others.try_encode(node, bytes, converter)?,
        }
        Ok(())
    }

    fn try_decode_expr(
        &self,
        bytes: &[u8],
        inputs: &[Arc<dyn PhysicalExpr>],
        context: &PhysicalExprDecodeCtx<'_>,
    ) -> EngineResult<Arc<dyn PhysicalExpr>> {
        self.others.try_decode_expr(bytes, inputs, context)
    }

    fn try_encode_expr(
        &self,
        node: &Arc<dyn PhysicalExpr>,
        bytes: &mut Vec<u8>,
        context: &PhysicalExprEncodeCtx<'_>,
    ) -> EngineResult<()> {
        self.others.try_encode_expr(node, bytes, context)
    }

    fn try_decode_udf(&self, name: &str, bytes: &[u8]) -> EngineResult<Arc<ScalarUDF>> {
        functions::scalar(name).map_or_else(|| self.others.try_decode_udf(name, bytes), Ok)
    }

    fn try_encode_udf(&self, function: &ScalarUDF, bytes: &mut Vec<u8>) -> EngineResult<()> {
        match functions::scalar(function.name()) {
            Some(_) => Ok(()),
            None => self.others.try_encode_udf(function, bytes),
        }
    }

    fn try_decode_udaf(&self, name: &str, bytes: &[u8]) -> EngineResult<Arc<AggregateUDF>> {
        functions::aggregate(name).map_or_else(|| self.others.try_decode_udaf(name, bytes), Ok)
    }

    fn try_encode_udaf(&self, function: &AggregateUDF, bytes: &mut Vec<u8>) -> EngineResult<()> {
        match functions::aggregate(function.name()) {
            Some(_) => Ok(()),
            None => self.others.try_encode_udaf(function, bytes),
        }
    }

    fn try_decode_udwf(&self, name: &str, bytes: &[u8]) -> EngineResult<Arc<WindowUDF>> {
        self.others.try_decode_udwf(name, bytes)
    }

    fn try_encode_udwf(&self, function: &WindowUDF, bytes: &mut Vec<u8>) -> EngineResult<()> {
        self.others.try_encode_udwf(function, bytes)
    }
}
