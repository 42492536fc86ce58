"""Keeps apart what needs a process of its own: Triton reads settings when kernels are defined."""

import os

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_CHECKED = os.environ.get("SPECLM_TYPECHECK") != "0"

collect_ignore = [] if IS_INTERPRETED else ["interpreted"]
if IS_INTERPRETED or IS_CHECKED:
    collect_ignore.append("aot")
