//! Compiles the C++ shim against libtorch's headers and tells the program where libtorch's libraries lie.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=src/libtorch/shim.cpp");
    println!("cargo:rerun-if-changed=src/libtorch/jit.cpp");
    println!("cargo:rerun-if-changed=src/libtorch/guarded.h");
    let libtorch = PathBuf::from(env::var_os("LIBTORCH").unwrap_or_default());
    let library = libtorch.join("lib/libtorch_cpu.so");
    // Behind links lies the folder whose neighbours hold everything else, CUDA included.
    let Ok(library) = fs::canonicalize(&library) else {
        panic!("{} not found: run scripts/setup once, it fetches libtorch", library.display());
    };
    println!("cargo:rerun-if-changed={}", library.display());

    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .flag("-D_GLIBCXX_USE_CXX11_ABI=1")
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .file("src/libtorch/shim.cpp")
        .file("src/libtorch/jit.cpp")
        .compile("polytask_shim");
    println!("cargo:rustc-link-search=native={}", libtorch.join("lib").display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    if let Some(folder) = library.parent() {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    }
}
