//! Numbers of any Arrow column as elements of a tensor: cast, with missing ones filled, in one pass
//! from the column's buffer to their places.

use arrow::array::types::{
    Decimal64Type, Decimal128Type, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type,
    Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, GenericListArray, OffsetSizeTrait,
};
use arrow::buffer::NullBuffer;
use arrow::compute::cast;
use arrow::datatypes::DataType;
use candle_core::{DType, Device, Shape, Tensor, WithDType};
use half::{bf16, f16};

/// What a tensor can have for an element. Conversions give what is nearest, and whether that will do:
/// not so if the value is out of range, or a fraction where whole numbers are wanted. Without
/// branches, so that many are converted at once.
pub(super) trait Element: WithDType {
    fn from_float(value: f64) -> (Self, bool);
    fn from_whole(value: i64) -> (Self, bool);
}

macro_rules! whole_elements {
    ($($element:ty)*) => {$(
        impl Element for $element {
            fn from_float(value: f64) -> (Self, bool) {
                let near = value as $element;
                // `f64` rounds the largest of 64 bits up.
                let is_below = value < <$element>::MAX as f64 || size_of::<Self>() < 8;
                (near, (near as f64 == value) & is_below)
            }

            fn from_whole(value: i64) -> (Self, bool) {
                let near = value as $element;
                (near, near as i64 == value)
            }
        }
    )*};
}

macro_rules! float_elements {
    ($($element:ty: $of:expr;)*) => {$(
        impl Element for $element {
            fn from_float(value: f64) -> (Self, bool) {
                let near: Self = $of(value);
                (near, f64::from(near).is_finite() | !value.is_finite())
            }

            fn from_whole(value: i64) -> (Self, bool) {
                Self::from_float(value as f64)
            }
        }
    )*};
}

whole_elements!(u8 u32 i16 i32 i64);
float_elements! {
    f16: f16::from_f64;
    bf16: bf16::from_f64;
    f32: |value| value as f32;
    f64: |value| value;
}

/// Rows of one tensor, one after the other.
#[derive(Debug)]
pub(super) enum Values {
    U8(Vec<u8>),
    U32(Vec<u32>),
    I16(Vec<i16>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

/// Does the same to a vector of whatever type.
macro_rules! with_vec {
    ($values:expr, $vec:ident => $do:expr) => {
        match $values {
            Values::U8($vec) => $do,
            Values::U32($vec) => $do,
            Values::I16($vec) => $do,
            Values::I32($vec) => $do,
            Values::I64($vec) => $do,
            Values::F16($vec) => $do,
            Values::BF16($vec) => $do,
            Values::F32($vec) => $do,
            Values::F64($vec) => $do,
        }
    };
}

impl Values {
    /// Zeros; none for a type that tensors have but data has not.
    pub(super) fn zeros(dtype: DType, len: usize) -> Option<Self> {
        Some(match dtype {
            DType::U8 => Self::U8(vec![0; len]),
            DType::U32 => Self::U32(vec![0; len]),
            DType::I16 => Self::I16(vec![0; len]),
            DType::I32 => Self::I32(vec![0; len]),
            DType::I64 => Self::I64(vec![0; len]),
            DType::F16 => Self::F16(vec![f16::ZERO; len]),
            DType::BF16 => Self::BF16(vec![bf16::ZERO; len]),
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::F64 => Self::F64(vec![0.0; len]),
            _ => return None,
        })
    }

    /// As many elements; of those that were there, or zeros. Not in memory that was made for many more,
    /// which nobody would know of.
    pub(super) fn resize(&mut self, len: usize) {
        fn resize<T: WithDType>(all: &mut Vec<T>, len: usize) {
            let fits = all.capacity() >= len && all.capacity() - len <= len / 4;
            if !fits {
                // Before there is another.
                drop(std::mem::take(all));
            }
            all.resize(len, T::zero());
        }
        with_vec!(self, vec => resize(vec, len));
    }

    pub(super) fn put(&mut self, column: &Part<'_>, place: &Place) -> Result<(), Misfit> {
        with_vec!(self, vec => put(column, place, vec))
    }

    /// Rows of `width` elements as a tensor of the type that they have, or of another where they are kept
    /// as bytes.
    pub(super) fn gather(
        dtype: DType,
        shape: impl Into<Shape>,
        width: usize,
        from: &[&Self],
        picks: &[Pick],
    ) -> candle_core::Result<Tensor> {
        let shape = shape.into();
        let all = Gather { width, picks, elements: shape.elem_count(), from };
        let all = match dtype {
            DType::U8 => Self::U8(all.same()),
            DType::U32 => Self::U32(all.same()),
            DType::I16 => Self::I16(all.same()),
            DType::I32 => Self::I32(all.same()),
            DType::I64 => Self::I64(all.same()),
            DType::F16 => Self::F16(all.same_or_bytes()),
            DType::BF16 => Self::BF16(all.same_or_bytes()),
            DType::F32 => Self::F32(all.same_or_bytes()),
            DType::F64 => Self::F64(all.same_or_bytes()),
            _ => candle_core::bail!("no column can become a tensor of {dtype:?}"),
        };
        with_vec!(all, vec => Tensor::from_vec(vec, shape, &Device::Cpu))
    }
}

/// Rows that follow each other in one of the lists of rows that are given beside it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pick {
    pub(super) list: usize,
    pub(super) row: usize,
    pub(super) rows: usize,
}

/// What is gathered.
struct Gather<'a> {
    width: usize,
    picks: &'a [Pick],
    /// Of all rows.
    elements: usize,
    from: &'a [&'a Values],
}

impl<'a> Gather<'a> {
    fn lists<T: Kept>(&self) -> Option<Vec<&'a [T]>> {
        self.from.iter().map(|values| T::of(values)).collect()
    }

    fn same<T: Kept>(&self) -> Vec<T> {
        let Some(lists) = self.lists::<T>() else { unreachable!("{:?} are not kept", self.from) };
        self.collect(&lists, |element| element)
    }

    /// Bytes stay as small as they are until here.
    fn same_or_bytes<T: Kept + From<u8>>(&self) -> Vec<T> {
        match self.lists::<u8>() {
            Some(lists) => self.collect(&lists, T::from),
            None => self.same(),
        }
    }

    /// Where the compiler knows the width of a row, it copies one in an instruction or two.
    fn collect<S: Copy, T>(&self, lists: &[&[S]], convert: impl Fn(S) -> T) -> Vec<T> {
        match self.width {
            1 => self.collect_fixed::<1, S, T>(lists, convert),
            2 => self.collect_fixed::<2, S, T>(lists, convert),
            3 => self.collect_fixed::<3, S, T>(lists, convert),
            4 => self.collect_fixed::<4, S, T>(lists, convert),
            8 => self.collect_fixed::<8, S, T>(lists, convert),
            _ => self.collect_fixed::<0, S, T>(lists, convert),
        }
    }

    /// `W` is the width, or 0 for any.
    fn collect_fixed<const W: usize, S: Copy, T>(
        &self,
        lists: &[&[S]],
        convert: impl Fn(S) -> T,
    ) -> Vec<T> {
        let mut all = Vec::with_capacity(self.elements);
        let width = if W == 0 { self.width } else { W };
        for Pick { list, row, rows } in self.picks {
            let from = &lists[*list][row * width..];
            match (from.first_chunk::<W>(), rows) {
                (Some(row), 1) if W > 0 => all.extend(row.map(&convert)),
                _ => all.extend(from[..rows * width].iter().copied().map(&convert)),
            }
        }
        all
    }
}

/// What rows of tensors are kept as.
trait Kept: Copy {
    /// The elements, if they are of this type.
    fn of(values: &Values) -> Option<&[Self]>;
}

macro_rules! kept {
    ($($element:ty: $variant:ident;)*) => {$(
        impl Kept for $element {
            fn of(values: &Values) -> Option<&[Self]> {
                if let Values::$variant(all) = values { Some(all) } else { None }
            }
        }
    )*};
}

kept! {
    u8: U8;
    u32: U32;
    i16: I16;
    i32: I32;
    i64: I64;
    f16: F16;
    bf16: BF16;
    f32: F32;
    f64: F64;
}

/// A column of some rows, with `width` values to each of them.
pub(super) struct Part<'a> {
    pub(super) array: &'a ArrayRef,
    pub(super) width: usize,
    /// What a missing value becomes.
    pub(super) fill: Option<f64>,
    /// Whether longer lists are cut.
    pub(super) truncates: bool,
}

/// Where a column goes among the elements of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Of the first row of the column.
    pub(super) row: usize,
    /// Elements of a row of the tensor.
    pub(super) stride: usize,
    /// Of the column in a row.
    pub(super) offset: usize,
}

/// Why a column's values cannot be elements.
pub(super) enum Misfit {
    /// So many rows have missing values.
    Missing(usize),
    /// A value that the type has not.
    Range(String),
    /// A list that is longer than there is room for.
    Length(usize),
    /// What Arrow cannot cast.
    Cast(arrow::error::ArrowError),
}

/// One pass over a column.
fn put<T: Element>(part: &Part<'_>, place: &Place, all: &mut [T]) -> Result<(), Misfit> {
    let stride = place.stride;
    let rows = part.array.len();
    let out = &mut all[place.row * stride..(place.row + rows) * stride];
    let out = Out { all: out, stride, offset: place.offset, width: part.width };
    let fill = fill_of::<T>(part.fill)?;
    match part.array.data_type() {
        DataType::FixedSizeList(..) => {
            let (values, missing, hidden) = flat(part.array);
            if hidden > 0 {
                return Err(Misfit::Missing(hidden));
            }
            if let (Some(nulls), None) = (&missing, fill) {
                return Err(Misfit::Missing(nulls.null_count()));
            }
            out.put_array(&values, missing.as_ref(), fill)
        }
        DataType::List(_) => out.put_lists::<i32>(part.array.as_list(), fill, part.truncates),
        DataType::LargeList(_) => out.put_lists::<i64>(part.array.as_list(), fill, part.truncates),
        _ => out.put_array(part.array, None, fill),
    }
}

fn fill_of<T: Element>(fill: Option<f64>) -> Result<Option<T>, Misfit> {
    let Some(fill) = fill else { return Ok(None) };
    match T::from_float(fill) {
        (fill, true) => Ok(Some(fill)),
        _ => Err(Misfit::Range(fill.to_string())),
    }
}

/// The innermost values of lists of fixed sizes, which of the outermost lists are missing, and how
/// many of those in between.
fn flat(array: &ArrayRef) -> (ArrayRef, Option<NullBuffer>, usize) {
    let lists = array.as_fixed_size_list();
    let (mut values, mut hidden) = (lists.values().clone(), 0);
    while let DataType::FixedSizeList(..) = values.data_type() {
        hidden += values.null_count();
        values = values.as_fixed_size_list().values().clone();
    }
    (values, lists.nulls().filter(|nulls| nulls.null_count() > 0).cloned(), hidden)
}

/// What a decimal's last digit counts.
fn unit(scale: i8) -> f64 {
    10f64.powi(scale.into())
}

/// The elements that a column becomes.
struct Out<'a, T> {
    all: &'a mut [T],
    stride: usize,
    offset: usize,
    width: usize,
}

impl<T: Element> Out<'_, T> {
    fn put_array(
        self,
        values: &ArrayRef,
        missing: Option<&NullBuffer>,
        fill: Option<T>,
    ) -> Result<(), Misfit> {
        let whole = |value: i64| T::from_whole(value);
        match values.data_type() {
            DataType::Float64 => self.put::<Float64Type>(values, missing, fill, T::from_float),
            DataType::Float32 => {
                self.put::<Float32Type>(values, missing, fill, |v| T::from_float(f64::from(v)))
            }
            DataType::Float16 => {
                self.put::<Float16Type>(values, missing, fill, |v| T::from_float(f64::from(v)))
            }
            DataType::Int64 => self.put::<Int64Type>(values, missing, fill, whole),
            DataType::Int32 => self.put::<Int32Type>(values, missing, fill, |v| whole(v.into())),
            DataType::Int16 => self.put::<Int16Type>(values, missing, fill, |v| whole(v.into())),
            DataType::Int8 => self.put::<Int8Type>(values, missing, fill, |v| whole(v.into())),
            DataType::UInt32 => self.put::<UInt32Type>(values, missing, fill, |v| whole(v.into())),
            DataType::UInt16 => self.put::<UInt16Type>(values, missing, fill, |v| whole(v.into())),
            DataType::UInt8 => self.put::<UInt8Type>(values, missing, fill, |v| whole(v.into())),
            DataType::UInt64 => self.put::<UInt64Type>(values, missing, fill, |v| {
                i64::try_from(v).map_or_else(|_| T::from_float(v as f64), whole)
            }),
            DataType::Decimal64(_, 0) => self.put::<Decimal64Type>(values, missing, fill, whole),
            DataType::Decimal128(_, 0) => self.put::<Decimal128Type>(values, missing, fill, |v| {
                i64::try_from(v).map_or_else(|_| T::from_float(v as f64), whole)
            }),
            DataType::Decimal64(_, scale) => {
                let unit = unit(*scale);
                self.put::<Decimal64Type>(values, missing, fill, |v| T::from_float(v as f64 / unit))
            }
            DataType::Decimal128(_, scale) => {
                let unit = unit(*scale);
                let all = values.as_primitive::<Decimal128Type>().values();
                // One word becomes a number much faster than two.
                match all.iter().all(|value| i64::try_from(*value).is_ok()) {
                    true => self.put::<Decimal128Type>(values, missing, fill, |v| {
                        T::from_float(v as i64 as f64 / unit)
                    }),
                    false => self.put::<Decimal128Type>(values, missing, fill, |v| {
                        T::from_float(v as f64 / unit)
                    }),
                }
            }
            _ => {
                let values = cast(values, &DataType::Float64).map_err(Misfit::Cast)?;
                self.put::<Float64Type>(&values, missing, fill, T::from_float)
            }
        }
    }

    fn put<A: ArrowPrimitiveType>(
        self,
        array: &ArrayRef,
        missing: Option<&NullBuffer>,
        fill: Option<T>,
        convert: impl Fn(A::Native) -> (T, bool),
    ) -> Result<(), Misfit> {
        let array = array.as_primitive::<A>();
        let values = array.values();
        let nulls = array.nulls().filter(|nulls| nulls.null_count() > 0);
        if missing.is_some() || nulls.is_some() {
            let Some(fill) = fill else {
                let count = nulls.map_or(0, NullBuffer::null_count);
                return Err(Misfit::Missing(count.div_ceil(self.width.max(1))));
            };
            let width = self.width;
            let is_there = |at: usize| {
                missing.is_none_or(|rows| rows.is_valid(at / width))
                    && nulls.is_none_or(|nulls| nulls.is_valid(at))
            };
            let value = |at: usize| match is_there(at) {
                true => convert(values[at]),
                false => (fill, true),
            };
            return self.put_each(value).map_err(|at| Misfit::Range(format!("{:?}", values[at])));
        }
        let put = match self.width {
            1 => self.put_column(values, convert),
            _ => self.put_rows(values, convert),
        };
        put.map_err(|at| Misfit::Range(format!("{:?}", values[at])))
    }

    /// By their places; the error is that of one that does not fit.
    fn put_each(self, value: impl Fn(usize) -> (T, bool)) -> Result<(), usize> {
        for (row, out) in self.all.chunks_exact_mut(self.stride).enumerate() {
            for (at, out) in out[self.offset..][..self.width].iter_mut().enumerate() {
                let at = row * self.width + at;
                let (element, fits) = value(at);
                *out = element;
                fits.then_some(()).ok_or(at)?;
            }
        }
        Ok(())
    }

    /// The same where there is one to a row: some in a row are converted at once, then go to their
    /// places.
    fn put_column<V: Copy>(
        self,
        values: &[V],
        convert: impl Fn(V) -> (T, bool),
    ) -> Result<(), usize> {
        const SOME: usize = 256;
        let mut near = [T::zero(); SOME];
        for (at, values) in values.chunks(SOME).enumerate() {
            let first = at * SOME;
            convert_all(values, &mut near, &convert).map_err(|at| first + at)?;
            let out = self.all[first * self.stride..].iter_mut();
            let out = out.skip(self.offset).step_by(self.stride);
            out.zip(&near[..values.len()]).for_each(|(out, near)| *out = *near);
        }
        Ok(())
    }

    fn put_rows<V: Copy>(
        self,
        values: &[V],
        convert: impl Fn(V) -> (T, bool),
    ) -> Result<(), usize> {
        let (offset, width) = (self.offset, self.width);
        let rows = self.all.chunks_exact_mut(self.stride).zip(values.chunks_exact(width.max(1)));
        for (row, (out, values)) in rows.enumerate() {
            let out = &mut out[offset..][..width];
            convert_all(values, out, &convert).map_err(|at| row * width + at)?;
        }
        Ok(())
    }

    /// Lists of different lengths: what is behind their ends is filled.
    fn put_lists<O: OffsetSizeTrait>(
        self,
        lists: &GenericListArray<O>,
        fill: Option<T>,
        truncates: bool,
    ) -> Result<(), Misfit> {
        let padding = fill.unwrap_or_else(T::zero);
        for row in 0..lists.len() {
            let out = &mut self.all[row * self.stride + self.offset..][..self.width];
            out.fill(padding);
            if lists.is_null(row) {
                if fill.is_none() {
                    return Err(Misfit::Missing(lists.null_count()));
                }
                continue;
            }
            let values = lists.value(row);
            let values =
                if truncates { values.slice(0, values.len().min(self.width)) } else { values };
            let len = values.len();
            if len > self.width {
                return Err(Misfit::Length(len));
            }
            let out = Out { all: &mut out[..len], stride: len.max(1), offset: 0, width: len };
            if len > 0 {
                out.put_array(&values, None, fill)?;
            }
        }
        Ok(())
    }
}

/// As many values as there are; the error is the place of the first that does not fit.
fn convert_all<V: Copy, T: Element>(
    values: &[V],
    out: &mut [T],
    convert: impl Fn(V) -> (T, bool),
) -> Result<(), usize> {
    let mut all_fit = true;
    for (out, value) in out.iter_mut().zip(values) {
        let (near, fits) = convert(*value);
        *out = near;
        all_fit &= fits;
    }
    match all_fit {
        true => Ok(()),
        false => Err(values.iter().position(|value| !convert(*value).1).unwrap_or(0)),
    }
}
