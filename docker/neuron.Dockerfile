# The image for AWS Trainium 2 and 3, native TorchNeuron (Neuron SDK 2.33.0): `make docker-neuron`; docs/containers.md says how to run it.
# It has not been built: the Neuron packages are out of reach where it was written. Versions are those of AWS's release notes.
#
# The digests are the ones that public repositories record for these tags; nobody here has pulled them. `docker buildx imagetools inspect
# docker.io/library/python:3.12.15-slim-trixie` (and ubuntu:26.04) prints the tag's digest of today; write Python's into all three files.
ARG PYTHON=docker.io/library/python:3.12.15-slim-trixie@sha256:29113dcae7aad06daa8e95260fa09f27d62be33b9687ea3774f771d601a02256
# torch-neuronx 2.13.3 and 2.14.3 have wheels for Ubuntu 26.04 alone (older releases: from source), whose Python is 3.14.
ARG UBUNTU=docker.io/library/ubuntu:26.04@sha256:da6fc2be547864451aa253836dd926da33623312df4a9a243e35dc877c378a78

# The wheel is built apart, so that the build's tools and the sources do not reach the image.
FROM ${PYTHON} AS wheel
ARG PIP_CACHE_DIR=/var/cache/pip
WORKDIR /src
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    pip install --constraint /build/constraints.txt build hatchling
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY gpt gpt
RUN python -m build --wheel --no-isolation --outdir /dist

FROM ${UBUNTU}
LABEL org.opencontainers.image.title="gpt (Neuron)" org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG DEBIAN_FRONTEND=noninteractive
ARG PIP_CACHE_DIR=/var/cache/pip
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_ROOT_USER_ACTION=ignore

# g++ and Python, as AWS's instructions have it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

# Runtime, collectives and tools (neuron-ls, neuron-top); the driver is the host's. No EFA: one instance, not several.
ADD --chmod=644 https://apt.repos.neuron.amazonaws.com/GPG-PUB-KEY-AMAZON-AWS-NEURON.PUB /etc/apt/keyrings/neuron.asc
RUN . /etc/os-release \
    && echo "deb [signed-by=/etc/apt/keyrings/neuron.asc] https://apt.repos.neuron.amazonaws.com ${VERSION_CODENAME} main" \
        > /etc/apt/sources.list.d/neuron.list \
    && apt-get update \
    && apt-get install --yes --no-install-recommends \
        aws-neuronx-collectives=2.35.43.0* aws-neuronx-runtime-lib=2.35.30.0* aws-neuronx-tools=2.33.38.0* \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:/opt/aws/neuron/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LD_LIBRARY_PATH=/opt/aws/neuron/lib

# From the largest and slowest to change to the smallest: a change of gpt makes a new layer of a few megabytes only.
# torch first, without CUDA and without what it needs (that comes below, in the versions of constraints.txt). Its minor version and
# torch-neuronx's must be the same. Never torch_xla: an environment that has it is refused.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG NEURON_INDEX=https://pip.repos.neuron.amazonaws.com
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    pip install --no-deps --index-url "${TORCH_INDEX}" --constraint /build/constraints.txt torch
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    pip install --extra-index-url "${NEURON_INDEX}" --constraint /build/constraints.txt \
        "torch-neuronx==2.13.3.0.*" "neuronx-cc==2.28.7631.0" "nki==0.7.0"
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    --mount=type=bind,source=pyproject.toml,target=/build/pyproject.toml \
    python -c 'import tomllib; print(*tomllib.load(open("/build/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    | pip install --constraint /build/constraints.txt --requirement /dev/stdin
RUN --mount=type=bind,from=wheel,source=/dist,target=/build/dist \
    pip install --no-deps --no-index --no-cache-dir /build/dist/*.whl && pip check

# Any user id may run it (`docker run --user`), so these are open to all, as /tmp is. The caches lie in one folder, to be mounted:
# a compiled graph that is lost costs minutes of an expensive machine. Neuron's own variables are set by gpt, from the config.
RUN install --directory --mode 1777 /gpt /gpt/.cache /workspace
ENV HOME=/gpt \
    PYTHONUNBUFFERED=1 \
    TORCHINDUCTOR_CACHE_DIR=/gpt/.cache/torchinductor
WORKDIR /workspace

# Root, because this is the image of SageMaker jobs, whose /opt/ml belongs to root. Elsewhere: docker run --user, or --build-arg RUN_AS=1000
ARG RUN_AS=root
USER ${RUN_AS}
# There is no Trainium while an image is built, even on a Trainium machine: what can be tried is what was installed.
RUN gpt doctor device=cpu && rm -rf /tmp/* /gpt/.cache/* /workspace/*
ENTRYPOINT ["gpt"]
CMD ["--help"]
