#!/bin/sh
# check_cpu_symbols.sh NM OBJECT...: the CPU kernels, compiled once per instruction set, must define no shared (weak) function
# outside their own namespace: the linker keeps one copy of it, maybe the one that an older processor cannot run.
nm=$1
shift
shared=$("$nm" -C "$@" | grep ' [WVu] ' | grep -vE ' zigzag::(baseline|avx2|avx512)::|DW\.ref\.')
if [ -n "$shared" ]; then
  echo "functions shared between instruction sets:"
  echo "$shared" | sort -u
  exit 1
fi
