"""The compiler: model file -> graph -> passes -> a readable program with its kernels."""
