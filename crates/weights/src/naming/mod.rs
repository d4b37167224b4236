//! From the names that the models' code uses to the names (and layouts) in files.
//!
//! Each model asks for its parameters under one set of names, whatever file they come from; a [`Naming`] says where
//! the file keeps them. This is all that a new file layout needs. [`crate::detect`] chooses the naming for a file.

pub mod clip;
pub mod flux;
pub mod t5;
pub mod vae;

/// How to make one parameter from a file's tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recipe {
    /// The tensor of that name, as it is.
    Same(String),
    /// The tensor of that name with the expected shape (a 1x1 convolution as a matrix and the like).
    Reshaped(String),
    /// These tensors stacked along the first axis (separate q, k and v for one fused matrix); at least one.
    Rows(Vec<String>),
    /// The tensor of that name with the halves of its first axis swapped ((scale, shift) for (shift, scale)).
    SwappedHalves(String),
}

impl Recipe {
    /// The names of the tensors that it reads; at least one.
    pub fn parts(&self) -> &[String] {
        match self {
            Self::Same(part) | Self::Reshaped(part) | Self::SwappedHalves(part) => std::slice::from_ref(part),
            Self::Rows(parts) => parts,
        }
    }

    fn parts_mut(&mut self) -> &mut [String] {
        match self {
            Self::Same(part) | Self::Reshaped(part) | Self::SwappedHalves(part) => std::slice::from_mut(part),
            Self::Rows(parts) => parts,
        }
    }
}

/// Where a file keeps the parameter that the code calls `name`.
pub trait Naming: Send + Sync {
    fn recipe(&self, name: &str) -> Recipe;
}

impl<N: Naming + ?Sized> Naming for Box<N> {
    fn recipe(&self, name: &str) -> Recipe {
        (**self).recipe(name)
    }
}

/// The file uses the code's own names.
pub struct SameNames;

impl Naming for SameNames {
    fn recipe(&self, name: &str) -> Recipe {
        Recipe::Same(name.to_string())
    }
}

/// Another naming behind a prefix, as files that hold several components have it.
pub struct Prefixed<N> {
    pub prefix: String,
    pub naming: N,
}

impl<N: Naming> Naming for Prefixed<N> {
    fn recipe(&self, name: &str) -> Recipe {
        let mut recipe = self.naming.recipe(name);
        for part in recipe.parts_mut() {
            part.insert_str(0, &self.prefix);
        }
        recipe
    }
}
