# The image for machines without an accelerator: `make docker-cpu`; docs/containers.md says how to run it.
#
# The digest is the one that public repositories record for this tag; nobody here has pulled it. `docker buildx imagetools inspect
# docker.io/library/python:3.12.15-slim-trixie` prints the tag's digest of today; write it into all three files.
ARG PYTHON=docker.io/library/python:3.12.15-slim-trixie@sha256:29113dcae7aad06daa8e95260fa09f27d62be33b9687ea3774f771d601a02256

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

FROM ${PYTHON}
LABEL org.opencontainers.image.title="gpt (CPU)" org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG PIP_CACHE_DIR=/var/cache/pip
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_ROOT_USER_ACTION=ignore

# On a CPU torch.compile writes C++ and compiles it when a run starts.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# From the largest and slowest to change to the smallest: a change of gpt makes a new layer of a few megabytes only.
# The plain `torch` of the package index brings several gigabytes of CUDA; PyTorch's own index has the build without.
# It has no use for the rest: what torch needs comes with the next layer, in the versions of constraints.txt.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    pip install --no-deps --index-url "${TORCH_INDEX}" --constraint /build/constraints.txt torch
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    --mount=type=bind,source=pyproject.toml,target=/build/pyproject.toml \
    python -c 'import tomllib; print(*tomllib.load(open("/build/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    | pip install --constraint /build/constraints.txt --requirement /dev/stdin
RUN --mount=type=bind,from=wheel,source=/dist,target=/build/dist \
    pip install --no-deps --no-index --no-cache-dir /build/dist/*.whl && pip check

# Any user id may run it (`docker run --user`), so these are open to all, as /tmp is. The caches lie in one folder, to be mounted.
ARG USER_ID=1000
RUN useradd --uid "${USER_ID}" --no-create-home --home-dir /gpt gpt \
    && install --directory --mode 1777 /gpt /gpt/.cache /workspace
ENV HOME=/gpt \
    PYTHONUNBUFFERED=1 \
    TORCHINDUCTOR_CACHE_DIR=/gpt/.cache/torchinductor
WORKDIR /workspace

# For a SageMaker job, whose /opt/ml belongs to root: --build-arg RUN_AS=root
ARG RUN_AS=gpt
USER ${RUN_AS}
RUN gpt doctor && rm -rf /tmp/* /gpt/.cache/* /workspace/*
ENTRYPOINT ["gpt"]
CMD ["--help"]
