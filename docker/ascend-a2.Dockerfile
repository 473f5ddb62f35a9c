# Made by docker/generate.py: change that, and run it again.
# From the repository's root: docker build -f docker/ascend-a2.Dockerfile -t llava-npu .
FROM quay.io/ascend/cann:9.2.0-910b-ubuntu22.04-py3.11
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/llava-npu
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install torch==2.13.0+cpu torch-npu==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu \
    && sed '/^torch==/d' constraints.txt > /tmp/constraints.txt \
    && pip install -c /tmp/constraints.txt ".[train,eval,serve]" attrs cffi decorator protobuf psutil pyyaml scipy sympy \
    && rm /tmp/constraints.txt
WORKDIR /work
ENTRYPOINT ["/bin/bash", "-c", "for file in /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh; do [ -f \"$file\" ] && source \"$file\" && break; done; exec llava-npu \"$@\"", "--"]
CMD ["doctor"]
