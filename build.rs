//! Compiles the C++ shim against libtorch's headers, and links the program to libtorch's libraries.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    for file in ["guarded.h", "vectorized.h", "launch.h", "graph.cpp", "kernels.cpp", "functions.cpp"] {
        println!("cargo:rerun-if-changed=src/libtorch/{file}");
    }
    let libtorch = PathBuf::from(env::var_os("LIBTORCH").unwrap_or_default());
    let library = libtorch.join("lib/libtorch_cpu.so");
    // Symbolic links are resolved: the other libraries, CUDA included, are found relative to the real folder.
    let Ok(library) = fs::canonicalize(&library) else {
        panic!("{} not found: run scripts/setup once, it fetches libtorch", library.display());
    };
    println!("cargo:rerun-if-changed={}", library.display());

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .flag("-D_GLIBCXX_USE_CXX11_ABI=1")
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"));
    build_cuda(&build, &libtorch.join("cuda-include"));
    for name in ["shim", "jit", "beside", "lstm", "byte_convolution", "crf", "max_pool", "profile"] {
        let file = format!("src/libtorch/{name}.cpp");
        println!("cargo:rerun-if-changed={file}");
        build.file(file);
    }
    build.compile("polytask_shim");
    println!("cargo:rustc-link-search=native={}", libtorch.join("lib").display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    if let Some(folder) = library.parent() {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    }
}

/// Builds the shared library, to be embedded in the program, that needs CUDA's headers; an empty file without them.
fn build_cuda(build: &cc::Build, headers: &std::path::Path) {
    println!("cargo:rerun-if-changed={}", headers.display());
    let library = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("libpolytask_cuda.so");
    if !headers.join("cuda_runtime_api.h").exists() {
        fs::write(&library, []).expect("the folder of build outputs can be written to");
        return;
    }
    let mut command = build.clone().include(headers).get_compiler().to_command();
    // -s strips the symbol table; the functions called from Rust stay in the dynamic one.
    command.args(["-shared", "-fPIC", "-s", "-o"]).arg(&library);
    command.args(["graph", "kernels", "functions"].map(|name| format!("src/libtorch/{name}.cpp")));
    let status = command.status().expect("the C++ compiler runs");
    assert!(status.success(), "the C++ files that need CUDA do not compile");
}
