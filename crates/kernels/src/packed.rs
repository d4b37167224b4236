//! A weight matrix in fewer bits than are computed with.

use std::{ops::Range, sync::Arc};

use candle_core::{DType, Device, Result, Tensor, bail, quantized::QTensor};

use crate::Fp8;

/// A matrix `[rows, columns]` as its file holds it. Its rows lie in one part or several: q, k and v of a fused
/// projection may come from tensors of different types or scales. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Packed {
    columns: usize,
    parts: Vec<Part>,
}

/// Some of a matrix's rows.
#[derive(Debug, Clone)]
pub enum Part {
    /// Blocks of GGUF, `[all rows, columns]`, of which `rows` count.
    Blocks { blocks: Arc<QTensor>, rows: Range<usize> },
    /// `codes` `[rows, columns]` in u8, each standing for its value times `scale`.
    Fp8 { codes: Tensor, format: Fp8, scale: f32 },
    /// `[rows, columns]` in any dtype, mostly bf16 or f16 for a computation in f32.
    Dense(Tensor),
}

impl Packed {
    /// Stacks parts of the same number of columns.
    ///
    /// # Errors
    /// No parts, parts that are no matrices, or of different widths.
    pub fn stack(parts: Vec<Part>) -> Result<Self> {
        let mut columns = parts.iter().map(Part::columns);
        let Some(first) = columns.next().transpose()?.filter(|&columns| columns > 0) else {
            bail!("a matrix without rows or without columns")
        };
        for other in columns {
            let other = other?;
            if other != first {
                bail!("rows of {first} and of {other} columns in one matrix")
            }
        }
        Ok(Self { columns: first, parts })
    }

    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub fn rows(&self) -> usize {
        self.parts.iter().map(Part::rows).sum()
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of its parts.
    pub fn bytes(&self) -> usize {
        let part = |part: &Part| match part {
            Part::Blocks { blocks, rows } => {
                let row = blocks.storage_size_in_bytes() / blocks.shape().dims().first().copied().unwrap_or(1).max(1);
                rows.len() * row
            }
            Part::Fp8 { codes: tensor, .. } | Part::Dense(tensor) => {
                tensor.elem_count() * tensor.dtype().size_in_bytes()
            }
        };
        self.parts.iter().map(part).sum()
    }

    /// Some of its rows, without a copy.
    pub fn narrow(&self, range: Range<usize>) -> Result<Self> {
        if range.end > self.rows() || range.start >= range.end {
            bail!("rows {range:?} of a matrix that has {}", self.rows())
        }
        let mut first = 0;
        let mut parts = Vec::new();
        for part in &self.parts {
            let (start, end) = (range.start.max(first), range.end.min(first + part.rows()));
            if start < end {
                parts.push(part.narrow(start - first..end - first)?);
            }
            first += part.rows();
        }
        Self::stack(parts)
    }

    /// The rows of these numbers (a list of u32) in `dtype`: `[numbers, columns]`.
    pub fn select(&self, numbers: &Tensor, dtype: DType) -> Result<Tensor> {
        match self.parts.as_slice() {
            [Part::Blocks { blocks, rows: Range { start: 0, .. } }] => blocks.embedding(numbers)?.to_dtype(dtype),
            [Part::Fp8 { codes, format, scale }] => {
                Part::Fp8 { codes: codes.index_select(numbers, 0)?, format: *format, scale: *scale }.dequantise(dtype)
            }
            [Part::Dense(tensor)] => tensor.index_select(numbers, 0)?.to_dtype(dtype),
            // Each in its part.
            _ => {
                let numbers = numbers.to_vec1::<u32>()?.into_iter().map(|number| number as usize);
                let rows = numbers.map(|number| self.narrow(number..number + 1)?.dequantise(dtype));
                Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
            }
        }
    }

    /// All of its values in `dtype`, rounded once: `[rows, columns]`.
    pub fn dequantise(&self, dtype: DType) -> Result<Tensor> {
        let parts = self.parts.iter().map(|part| part.dequantise(dtype)).collect::<Result<Vec<_>>>()?;
        if let [part] = parts.as_slice() { Ok(part.clone()) } else { Tensor::cat(&parts, 0) }
    }
}

impl Part {
    /// Blocks with all of their rows.
    pub fn blocks(blocks: QTensor) -> Result<Self> {
        let (rows, _) = blocks.shape().dims2()?;
        Ok(Self::Blocks { blocks: Arc::new(blocks), rows: 0..rows })
    }

    pub fn rows(&self) -> usize {
        match self {
            Self::Blocks { rows, .. } => rows.len(),
            Self::Fp8 { codes: tensor, .. } | Self::Dense(tensor) => tensor.dims()[0],
        }
    }

    pub(crate) fn device(&self) -> Device {
        match self {
            Self::Blocks { blocks, .. } => blocks.device(),
            Self::Fp8 { codes: tensor, .. } | Self::Dense(tensor) => tensor.device().clone(),
        }
    }

    fn columns(&self) -> Result<usize> {
        let shape = match self {
            Self::Blocks { blocks, .. } => blocks.shape(),
            Self::Fp8 { codes: tensor, .. } | Self::Dense(tensor) => tensor.shape(),
        };
        shape.dims2().map(|(_, columns)| columns)
    }

    fn narrow(&self, range: Range<usize>) -> Result<Self> {
        Ok(match self {
            Self::Blocks { blocks, rows } => {
                Self::Blocks { blocks: blocks.clone(), rows: rows.start + range.start..rows.start + range.end }
            }
            Self::Fp8 { codes, format, scale } => {
                Self::Fp8 { codes: codes.narrow(0, range.start, range.len())?, format: *format, scale: *scale }
            }
            Self::Dense(tensor) => Self::Dense(tensor.narrow(0, range.start, range.len())?),
        })
    }

    /// Its values in `dtype`, in candle's own operations, on the part's device: `[rows, columns]`.
    pub fn dequantise(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Blocks { blocks, rows } => {
                // candle has no dequantisation of a range, but an embedding is one: of the rows that are asked for.
                let rows = Tensor::arange(rows.start as u32, rows.end as u32, &blocks.device())?;
                blocks.embedding(&rows)?.to_dtype(dtype)
            }
            Self::Fp8 { codes, format, scale } => format.values(codes, *scale, dtype),
            Self::Dense(tensor) => tensor.to_dtype(dtype),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;

    use super::*;

    fn sum(x: &Tensor) -> f32 {
        x.sum_all().unwrap().to_scalar().unwrap()
    }

    fn random(rows: usize) -> Tensor {
        crate::random::random((rows, 64))
    }

    #[test]
    fn rows_are_those_of_the_parts_in_order() {
        let blocks = QTensor::quantize(&random(5), GgmlDType::Q8_0).unwrap();
        // Finite ones: numbers that are none equal nothing.
        let codes = Tensor::arange(0u8, 96, &Device::Cpu).unwrap().repeat(2).unwrap().reshape((3, 64)).unwrap();
        let half = random(4).to_dtype(DType::BF16).unwrap();
        let expected = [
            blocks.dequantize(&Device::Cpu).unwrap(),
            Tensor::new(&Fp8::E5m2.table(0.5)[..96], &Device::Cpu)
                .unwrap()
                .repeat(2)
                .unwrap()
                .reshape((3, 64))
                .unwrap(),
            half.to_dtype(DType::F32).unwrap(),
        ];
        let expected = Tensor::cat(&expected, 0).unwrap();
        let codes = Part::Fp8 { codes, format: Fp8::E5m2, scale: 0.5 };
        let packed = Packed::stack(vec![Part::blocks(blocks).unwrap(), codes, Part::Dense(half)]).unwrap();
        assert_eq!((packed.rows(), packed.columns(), packed.bytes()), (12, 64, 5 * 2 * 34 + 3 * 64 + 4 * 128));
        for range in [0..12, 4..5, 1..4, 5..8, 2..11, 11..12] {
            let part = packed.narrow(range.clone()).unwrap();
            assert_eq!(part.rows(), range.len());
            let found = part.dequantise(DType::F32).unwrap();
            let expected = expected.narrow(0, range.start, range.len()).unwrap();
            assert_eq!(sum(&found.ne(&expected).unwrap().to_dtype(DType::F32).unwrap()), 0.0, "{range:?}");
        }
        let numbers = Tensor::new(&[2u32, 0, 2], &Device::Cpu).unwrap();
        for one in [0..5, 5..8, 8..12, 3..9, 4..9] {
            let selected = packed.narrow(one.clone()).unwrap().select(&numbers, DType::F32).unwrap();
            let expected = expected.narrow(0, one.start, one.len()).unwrap().index_select(&numbers, 0).unwrap();
            assert_eq!(selected.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap(), "{one:?}");
        }
        // A part of a part.
        let inner = packed.narrow(1..9).unwrap().narrow(2..6).unwrap().dequantise(DType::F32).unwrap();
        assert_eq!(inner.to_vec2::<f32>().unwrap(), expected.narrow(0, 3, 4).unwrap().to_vec2::<f32>().unwrap());
        assert_eq!(packed.narrow(1..9).unwrap().bytes(), 4 * 2 * 34 + 3 * 64 + 128);
    }

    #[test]
    fn what_is_no_matrix_is_refused() {
        let half = |rows: usize, columns: usize| {
            Part::Dense(Tensor::zeros((rows, columns), DType::BF16, &Device::Cpu).unwrap())
        };
        assert!(Packed::stack(vec![]).is_err());
        assert!(Packed::stack(vec![half(2, 4), half(2, 6)]).is_err());
        assert!(Packed::stack(vec![Part::Dense(Tensor::zeros(4, DType::BF16, &Device::Cpu).unwrap())]).is_err());
        let packed = Packed::stack(vec![half(2, 4)]).unwrap();
        assert!(packed.narrow(1..3).is_err() && packed.narrow(1..1).is_err());
    }
}
