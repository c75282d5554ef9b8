//! TorchScript modules: built from source, saved with extra files, loaded and run.

use std::ffi::{CStr, CString, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use super::{checked, handles, pt_free};

#[repr(C)]
struct Module {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn pt_module_new(name: *const c_char, out: *mut *mut Module) -> *mut c_char;
    fn pt_module_free(module: *mut Module);
    fn pt_module_tensor(
        module: *mut Module,
        name: *const c_char,
        value: *mut C_tensor,
        is_parameter: bool,
    ) -> *mut c_char;
    fn pt_module_child(module: *mut Module, name: *const c_char, child: *mut Module) -> *mut c_char;
    fn pt_module_define(module: *mut Module, source: *const c_char) -> *mut c_char;
    fn pt_module_quantized_linear(module: *mut Module, weight: *mut C_tensor, bias: *mut C_tensor) -> *mut c_char;
    fn pt_module_quantized_cell(module: *mut Module, name: *const c_char, weights: *const *mut C_tensor)
    -> *mut c_char;
    fn pt_module_convert(module: *mut Module, kind: i32) -> *mut c_char;
    fn pt_module_save(
        module: *mut Module,
        path: *const c_char,
        n: usize,
        names: *const *const c_char,
        contents: *const *const c_char,
        lengths: *const usize,
    ) -> *mut c_char;
    fn pt_module_load(
        path: *const c_char,
        n: usize,
        names: *const *const c_char,
        contents: *mut *mut c_char,
        out: *mut *mut Module,
    ) -> *mut c_char;
    fn pt_module_parameters(
        module: *mut Module,
        capacity: usize,
        names: *mut *mut c_char,
        tensors: *mut *mut C_tensor,
        n: *mut usize,
    ) -> *mut c_char;
    fn pt_module_forward(
        module: *mut Module,
        n_inputs: usize,
        inputs: *const *mut C_tensor,
        capacity: usize,
        names: *mut *mut c_char,
        tensors: *mut *mut C_tensor,
        n: *mut usize,
    ) -> *mut c_char;
}

/// A TorchScript module.
pub struct ScriptModule(*mut Module);

impl Drop for ScriptModule {
    fn drop(&mut self) {
        // SAFETY: made by the shim, freed once.
        unsafe { pt_module_free(self.0) }
    }
}

/// The largest number of parameters or outputs of a module.
const CAPACITY: usize = 4096;

fn text(text: &str) -> Result<CString> {
    CString::new(text).context("a zero byte in a text for TorchScript")
}

/// The number of `kind` in `c10::ScalarType`.
fn scalar_type(kind: Kind) -> Result<i32> {
    match kind {
        Kind::Half => Ok(5),
        Kind::Float => Ok(6),
        Kind::BFloat16 => Ok(15),
        other => bail!("no model is exported as {other:?}"),
    }
}

/// Copies a text that the shim allocated, and frees it.
fn owned(text: *mut c_char) -> String {
    // SAFETY: a NUL-terminated string of the shim's, freed once, here.
    unsafe {
        let copy = CStr::from_ptr(text).to_string_lossy().into_owned();
        pt_free(text);
        copy
    }
}

impl ScriptModule {
    /// An empty module; `name` is the name of its type in the file.
    pub fn new(name: &str) -> Result<Self> {
        let mut module = std::ptr::null_mut();
        // SAFETY: on success the shim hands over one new module.
        checked(unsafe { pt_module_new(text(name)?.as_ptr(), &mut module) })?;
        Ok(ScriptModule(module))
    }

    /// Adds a trainable tensor.
    pub fn add_parameter(&mut self, name: &str, value: &Tensor) -> Result<()> {
        self.add(name, value, true)
    }

    /// Adds a constant tensor.
    pub fn add_buffer(&mut self, name: &str, value: &Tensor) -> Result<()> {
        self.add(name, value, false)
    }

    fn add(&mut self, name: &str, value: &Tensor, is_parameter: bool) -> Result<()> {
        // SAFETY: module, text and tensor live through the call.
        checked(unsafe { pt_module_tensor(self.0, text(name)?.as_ptr(), value.as_ptr().cast_mut(), is_parameter) })
    }

    /// Adds an attribute `packed`: an affine map with int8 weights, for `quantized.linear_dynamic`.
    pub fn add_quantized_linear(&mut self, weight: &Tensor, bias: &Tensor) -> Result<()> {
        let (weight, bias) = (weight.as_ptr().cast_mut(), bias.as_ptr().cast_mut());
        // SAFETY: module and tensors live through the call.
        checked(unsafe { pt_module_quantized_linear(self.0, weight, bias) })
    }

    /// Adds an attribute for `torch.quantized_lstm`: one direction of one layer with int8 weights. `weights` are
    /// weight_ih, weight_hh, bias_ih and bias_hh.
    pub fn add_quantized_cell(&mut self, name: &str, weights: &[Tensor; 4]) -> Result<()> {
        let weights = handles(&weights.each_ref());
        // SAFETY: module, text and the four tensors live through the call.
        checked(unsafe { pt_module_quantized_cell(self.0, text(name)?.as_ptr(), weights.as_ptr()) })
    }

    /// Adds a module below this one.
    pub fn add_child(&mut self, name: &str, child: &ScriptModule) -> Result<()> {
        // SAFETY: both modules live through the call; the shim keeps a reference of its own.
        checked(unsafe { pt_module_child(self.0, text(name)?.as_ptr(), child.0) })
    }

    /// Compiles methods from TorchScript source.
    pub fn define(&mut self, source: &str) -> Result<()> {
        // SAFETY: module and text live through the call.
        checked(unsafe { pt_module_define(self.0, text(source)?.as_ptr()) })
    }

    /// Moves parameters and floating-point buffers to another kind, as `.to()` does.
    pub fn convert(&mut self, kind: Kind) -> Result<()> {
        // SAFETY: the module lives through the call.
        checked(unsafe { pt_module_convert(self.0, scalar_type(kind)?) })
    }

    /// Writes the module together with `extra` files (name, content).
    pub fn save(&self, path: &Path, extra: &[(&str, String)]) -> Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let names: Vec<CString> = extra.iter().map(|(name, _)| text(name)).collect::<Result<_>>()?;
        let names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let contents: Vec<*const c_char> = extra.iter().map(|(_, content)| content.as_ptr().cast()).collect();
        let lengths: Vec<usize> = extra.iter().map(|(_, content)| content.len()).collect();
        // SAFETY: the lists are of one length and live through the call; contents come with their lengths.
        checked(unsafe {
            pt_module_save(self.0, path.as_ptr(), names.len(), names.as_ptr(), contents.as_ptr(), lengths.as_ptr())
        })
    }

    /// Reads a module onto the CPU, and the contents of its `extra` files by name; empty for a missing one.
    pub fn load(path: &Path, extra: &[&str]) -> Result<(Self, Vec<String>)> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let names: Vec<CString> = extra.iter().map(|name| text(name)).collect::<Result<_>>()?;
        let names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let mut contents = vec![std::ptr::null_mut(); names.len()];
        let mut module = std::ptr::null_mut();
        // SAFETY: on success the shim hands over one module and as many texts as names.
        checked(unsafe {
            pt_module_load(path.as_ptr(), names.len(), names.as_ptr(), contents.as_mut_ptr(), &mut module)
        })?;
        Ok((ScriptModule(module), contents.into_iter().map(owned).collect()))
    }

    /// All parameters by their path.
    pub fn parameters(&self) -> Result<Vec<(String, Tensor)>> {
        // SAFETY: the module lives through the call, the lists have room for CAPACITY entries.
        entries(|names, tensors, n| unsafe { pt_module_parameters(self.0, CAPACITY, names, tensors, n) })
    }

    /// `forward(inputs...)`, for a module that returns a dictionary of tensors, or a tuple, with empty names.
    pub fn forward(&self, inputs: &[&Tensor]) -> Result<Vec<(String, Tensor)>> {
        let inputs = handles(inputs);
        // SAFETY: module and inputs live through the call, the lists have room for CAPACITY entries.
        entries(|names, tensors, n| unsafe {
            pt_module_forward(self.0, inputs.len(), inputs.as_ptr(), CAPACITY, names, tensors, n)
        })
    }
}

fn entries(
    call: impl Fn(*mut *mut c_char, *mut *mut C_tensor, *mut usize) -> *mut c_char,
) -> Result<Vec<(String, Tensor)>> {
    let mut names = vec![std::ptr::null_mut(); CAPACITY];
    let mut tensors = vec![std::ptr::null_mut(); CAPACITY];
    let mut n = 0;
    checked(call(names.as_mut_ptr(), tensors.as_mut_ptr(), &mut n))?;
    ensure!(n <= CAPACITY, "a TorchScript module with {n} entries");
    let entry = |(name, tensor): (*mut c_char, *mut C_tensor)| {
        // SAFETY: the shim returned one new tensor per entry.
        (owned(name), unsafe { Tensor::from_ptr(tensor) })
    };
    Ok(names.into_iter().zip(tensors).take(n).map(entry).collect())
}
