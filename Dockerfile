# axolotl for NVIDIA GPUs: docker build -t axolotl . ; how to run it stands in docs/containers.md
# torch brings its own CUDA libraries. The base gives the compiler that DeepSpeed and torch.compile call; its CUDA has to be
# that of the torch in constraints.txt (13.0, driver 580 or newer).
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${CUDA_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Debian's and Ubuntu's archives keep only the newest build of a version, so an exact pin would not be found next month.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates git libaio-dev ninja-build python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# Everything that is written at run time belongs to this user; the folders of caches are there to be mounted.
ARG UID=10001
RUN useradd --create-home --uid "${UID}" --shell /bin/bash axolotl \
    && mkdir -p /workspace /cache/huggingface /cache/triton /opt/axolotl \
    && chown -R axolotl:axolotl /workspace /cache /opt/axolotl
USER ${UID}
WORKDIR /opt/axolotl

ENV VIRTUAL_ENV=/opt/axolotl/venv \
    PATH=/opt/axolotl/venv/bin:$PATH \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    NCCL_NVLS_ENABLE=0

# The exact versions of the tests. torch first: it is most of the image, and changes least.
COPY --chown=axolotl:axolotl constraints.txt constraints-extras.txt ./
ARG TORCH_INDEX=https://pypi.org/simple
RUN python3 -m venv "${VIRTUAL_ENV}" \
    && pip install --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"

COPY --chown=axolotl:axolotl pyproject.toml README.md LICENSE ./
COPY --chown=axolotl:axolotl src ./src
COPY --chown=axolotl:axolotl examples ./examples
ARG EXTRAS=bitsandbytes,deepspeed,kernels,liger,ray,tensorboard,torchao,wandb
# A constraint may not name extras, and torch decides on its own triton.
RUN sed -e 's/\[[^]]*\]//' -e '/^triton==/d' constraints-extras.txt > extras.txt \
    && pip install ".[${EXTRAS}]" -c constraints.txt -c extras.txt \
    && axolotl --version

WORKDIR /workspace
# tini passes signals on, so that `docker stop` lets a run save a checkpoint, and ends what is left behind.
ENTRYPOINT ["/usr/bin/tini", "--", "axolotl"]
CMD ["--help"]
