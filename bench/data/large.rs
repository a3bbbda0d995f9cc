//! Work on more data than there is memory for: `MOBULA_DATA_BYTES` says how much there is.

use crate::{cpu, peak};
use anyhow::{Result, bail};
use arrow::array::AsArray;
use arrow::datatypes::{Decimal128Type, Int64Type};
use mobula_data::{Dataset, JoinType};
use serde_json::{Value, json};
use std::time::Instant;

pub(crate) fn work(file: &str, what: &str) -> Result<Value> {
    let (start, before) = (Instant::now(), cpu());
    let rows = Dataset::read_parquet(file)?;
    let result = match what {
        "sort" => rows.sort(["l_shipdate", "l_orderkey", "l_linenumber"])?,
        "shuffle" => rows.random_shuffle(7)?,
        "group" => rows.aggregate(
            ["l_orderkey"],
            ["count(*) AS n", "max(l_comment) AS last", "sum(l_quantity) AS quantity"],
        )?,
        "join" => {
            let orders = file.replace("lineitem", "orders");
            let orders = Dataset::read_parquet(orders)?.rename("o_orderkey", "l_orderkey")?;
            rows.join(&orders, ["l_orderkey"], JoinType::Inner)?
        }
        _ => bail!("no such work: {what:?}"),
    };
    // Something that depends on the order of the rows, if they have one, and reads all of them.
    let (mut sum, mut count, is_ordered) = (0.0, 0_u64, what != "join");
    for block in result.batches()? {
        let block = block?;
        let keys =
            block.column_by_name("l_orderkey").map(|c| c.as_primitive::<Int64Type>().clone());
        for key in keys.iter().flat_map(|keys| keys.values()) {
            count += 1;
            sum += *key as f64 * if is_ordered { (count % 1000) as f64 } else { 1.0 };
        }
        if let Some(customers) = block.column_by_name("o_custkey") {
            let customers = customers.as_primitive::<Int64Type>().values();
            sum += customers.iter().map(|customer| *customer as f64).sum::<f64>();
        }
        if let Some(quantity) = block.column_by_name("quantity") {
            sum += quantity
                .as_primitive::<Decimal128Type>()
                .values()
                .iter()
                .map(|q| *q as f64)
                .sum::<f64>();
        }
    }
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu() - before);
    Ok(json!({
        "seconds": seconds, "cpu": cpu.as_secs_f64(), "rows": count, "sum": sum, "peak": peak()?
    }))
}
