#!/bin/sh
# The compiler for what is fuzzed: the workspace's own crates count which edges they take, for libFuzzer
# (https://clang.llvm.org/docs/SanitizerCoverage.html). The dependencies are built as ever.
exec "$@" -Copt-level=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
