//! Lazy datasets on DataFusion: read, transform, split, and stream as tensors.
//!
//! A [`Dataset`] is a description of rows. It is cheap to clone and to send; worker processes open
//! it and read the blocks of their shard. A [`Preprocessor`] is fitted on the training rows and
//! applied, from one definition, in training and in serving. Rows come from files, databases and programs.
//!
//! ```
//! use mobula_core::{BatchSource, Shard};
//! use mobula_data::{Dataset, StandardScaler, StreamOptions};
//!
//! # std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).unwrap();
//! let digits = Dataset::read_parquet("examples/data/digits-*.parquet")?;
//! let (train, _test) = digits.train_test_split(0.2, 7)?;
//! let scaler = StandardScaler::fit(&train, ["image"])?;
//! let options = StreamOptions::new(["image"], "label").with_batch_size(64).with_shuffle(7);
//! let source = train.preprocess(&scaler)?.stream(options)?;
//!
//! let mut stream = source.open(Shard::ALL)?;
//! let batch = stream.next_batch()?.expect("a first step");
//! assert_eq!(batch.get("image")?.dims(), [64, 64]);
//! assert_eq!(batch.get("label")?.dims(), [64]);
//! # Ok::<(), mobula_core::Error>(())
//! ```
//!
//! What it will not do: shuffle by holding a buffer and losing its place, drop the last rows of an
//! epoch, or give ranks other batches because there are more of them. It distributes no
//! query by itself: [`Dataset::sql`] runs in one process, and other engines are for more (feature `backend`).

#[cfg(feature = "backend")]
pub mod backend;
mod batch_fn;
mod batches;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
mod database;
mod dataset;
mod dataset_table;
mod error;
mod exchange;
mod explain;
mod formats;
mod frame;
mod functions;
mod hash_exchange;
mod hive;
mod in_order;
mod in_turn;
pub mod inspect;
mod kept_parts;
mod left_out;
mod memory;
mod operator;
mod order;
mod parts;
mod persist;
mod plan;
#[cfg(feature = "postgres")]
mod postgres;
mod preprocess;
mod query;
mod read;
mod remote;
mod resample;
pub mod rows;
mod runtime;
mod scan;
mod session;
mod shared;
mod sink;
mod source;
mod spill;
mod split;
#[cfg(feature = "sqlite")]
mod sqlite;
mod stage;
mod store;
mod stream;
mod tables;
mod top_k;
mod typed;

pub use batch_fn::{BatchActor, BatchFn};
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub use database::IfExists;
pub use dataset::Dataset;
pub use error::{Error, Result};
pub use frame::JoinType;
pub use functions::{AggregateFn, Aggregator, FnTypes, ScalarFn};
/// For registering a [`BatchFn`], [`ScalarFn`] or [`AggregateFn`].
pub use inventory;
pub use persist::{BlockRef, StorageLevel};
#[cfg(feature = "postgres")]
pub use postgres::{PostgresOptions, PostgresWriteOptions};
pub use preprocess::{
    Chain, Concatenator, CountVectorizer, Estimator, FeatureHasher, Fill, KBinsDiscretizer,
    LabelEncoder, MaxAbsScaler, MinMaxScaler, MultiHotEncoder, Norm, Normalizer, OneHotEncoder,
    OrdinalEncoder, Power, PowerTransformer, Preprocessor, RobustScaler, SimpleImputer,
    StandardScaler, Step, Strategy, StringLookup, TfidfVectorizer, Tokenizer, Transform, Unknown,
    Value,
};
pub use query::{QueryRows, query, query_batches};
pub use sink::{
    CsvSink, IpcSink, JsonSink, ParquetCompression, ParquetSink, Sink, SinkFile, WebDatasetSink,
    WriteOptions, Written, WrittenFile,
};
pub use source::csv::CsvOptions;
pub use source::parquet::ParquetOptions;
pub use source::{BatchIter, Blocks, Source};
pub use stage::{StageReport, Stall, stages};
pub use stream::{Collate, ImageAugment, Rows, StreamOptions, TensorSource, TensorSpec};
/// For registering a [`Source`], or writing a [`Transform`] of your own as JSON.
pub use typetag;
