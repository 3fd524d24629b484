#!/bin/sh
# Reduces a virtual environment to what a server loads, and compiles the modules that every start imports:
#   deploy/slim.sh /opt/prelude
#
# It removes torch's C++ headers and test programs, tests of other packages, type stubs and static libraries, and the
# symbols of shared libraries, which only a debugger reads. Libraries in *.libs/ keep theirs: `strip` breaks files that
# patchelf has rewritten. So do the libraries of CUDA, which nobody has run stripped.
set -eu

site=$(echo "$1"/lib/python3*/site-packages)

rm -rf "$site"/torch/include "$site"/torch/share/cmake "$site"/torch/test \
  "$site"/torch/bin/protoc* "$site"/torch/bin/test_* "$site"/torch/bin/*Test
find "$site" -type d \( -name tests -o -path '*/nltk/test' \) -prune -exec rm -rf {} +
find "$site" -type f \( -name '*.pyi' -o -name '*.a' \) -delete
find "$site" -type f -name '*.so*' -size +200k -not -path '*.libs/*' -not -path '*/nvidia/*' -not -name '*cuda*' \
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
