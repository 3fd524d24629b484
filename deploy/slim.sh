#!/bin/sh
# Reduces a virtual environment to what a server loads, and compiles the modules that every start imports:
#   deploy/slim.sh /opt/prelude
#
# It removes torch's C++ headers and test programs, tests of other packages, type stubs, static libraries, sources in C
# and Cython with their headers, modular_*.py of transformers, from which its own modeling_*.py are generated, and the
# symbols of shared libraries, which only a debugger reads. Libraries in *.libs/ keep theirs: `strip` breaks files that
# patchelf has rewritten. The libraries of CUDA are left as they are, because nobody has run them stripped, and so is
# triton, which compiles C for the machine it runs on.
set -eu

site=$(echo "$1"/lib/python3*/site-packages)

rm -rf "$site"/torch/include "$site"/torch/share/cmake "$site"/torch/test \
  "$site"/torch/bin/protoc* "$site"/torch/bin/test_* "$site"/torch/bin/*Test "$site"/torch/lib/*_test.so \
  "$site"/transformers/models/*/modular_*.py
find "$site" -type d \( -name tests -o -path '*/nltk/test' \) -prune -exec rm -rf {} +
find "$site" -type f -not -path '*/triton/*' -not -path '*/nvidia/*' \( -name '*.pyi' -o -name '*.a' -o -name '*.c' \
  -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' \) -delete
find "$site" -type f -name '*.so*' -size +200k -not -path '*.libs/*' -not -path '*/nvidia/*' \
  -not -path '*/triton/*' -not -name '*cuda*' \
  -exec strip --strip-unneeded {} +

# An import writes the compiled files; it also proves that nothing needed is gone.
"$1"/bin/python - <<'END'
import importlib

MODULES = """
accelerate fastapi fastapi.middleware.cors fastapi_offline gguf httptools httpx huggingface_hub jinja2 llguidance
llguidance.hf matplotlib.backends.backend_svg matplotlib.figure numba numpy obstore obstore.store
opentelemetry.exporter.otlp.proto.http.trace_exporter opentelemetry.sdk.trace prometheus_client psutil pydantic_settings
python_multipart rich.console rich.progress rich.table rouge_score.rouge_scorer sacrebleu.metrics safetensors.torch
structlog tokenizers torch tqdm transformers.models.auto.modeling_auto transformers.models.llama.modeling_llama
transformers.models.qwen2.modeling_qwen2 typer uvicorn uvicorn.protocols.http.httptools_impl uvloop watchfiles
""".split()
for name in MODULES:
    importlib.import_module(name)
END
