# megatron-dla on a CUDA base: docker build -t megatron-dla . (pyxis, apptainer: docs/slurm.md#containers)
# torch's wheel brings the CUDA libraries and triton's its compiler, so that the base image without them is enough; triton
# builds a small launcher for each kernel, which needs gcc and Python's headers.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-dev python3.12-venv gcc g++ git \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1

WORKDIR /opt/megatron-dla
# the large packages first: a change of the code does not fetch them again
COPY constraints.txt constraints-cuda.txt ./
RUN pip install -c constraints-cuda.txt torch \
    && pip install -c constraints-cuda.txt setuptools wheel ninja psutil numpy \
    && pip install -c constraints-cuda.txt --no-build-isolation deepspeed

COPY pyproject.toml README.md LICENSE ./
COPY megatron_dla megatron_dla
COPY kernels kernels
COPY launch launch
COPY data_prep data_prep
COPY configs configs
COPY slurm slurm
RUN pip install -c constraints-cuda.txt --no-build-isolation '.[gpu,serve]' && pip check && dla --help >/dev/null

WORKDIR /workspace
