# Two images of one project: `docker build --target cpu` for heads and rollout workers, `--target gpu` for engines,
# Judge and learner. Never built: no Docker daemon was at hand. docs/cluster.md says what was checked instead.
#
# The base is Python's own image, not Ray's. So Ray comes from pyproject.toml, in the version that CI tests, beside the
# same wheels; torch and vLLM bring CUDA's libraries with them, and the driver comes from the host. What `ray up` and
# KubeRay need beside Ray are five packages of Debian.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS base
# openssh-client and rsync: `ray up` reaches the workers from the head's container. wget: KubeRay's probes. procps: ps,
# to look around. gcc and libc6-dev: Triton compiles a launcher for the kernels of vLLM.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client rsync wget procps gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# User, id and home are those of Ray's own images, which `ray up` and KubeRay's manifests count on. ~/.ray is there
# before the token is mounted into it: Docker would make it root's.
RUN useradd --create-home --uid 1000 --shell /bin/bash ray \
    && install --directory --owner=ray --group=ray --mode=700 /home/ray/.ray \
    && install --directory --owner=ray --group=ray /var/lib/roro /var/lib/roro/huggingface /var/lib/roro/spill \
    && install --directory --owner=ray --group=ray /srv/roro
# One thread per process: several processes share the cores, and OpenMP's busy waiting makes them 10 to 100x slower.
# Weights are kept in a folder that can be mounted, so that a new container need not fetch them again.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH \
    VIRTUAL_ENV=/opt/venv \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 \
    TOKENIZERS_PARALLELISM=false \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HOME=/var/lib/roro/huggingface
RUN python -m venv /opt/venv
WORKDIR /srv/roro
# Dependencies before code: a change of the code does not install them anew. Google's client and boto3 start nodes;
# boto3 comes last, in the version of the botocore that s3fs needs, since pip would otherwise try hundreds of others.
COPY pyproject.toml docker/requirements.py ./
RUN python requirements.py s3 gcs openai > requirements.txt \
    && echo 'google-api-python-client>=2.100,<3' >> requirements.txt

FROM base AS cpu-packages
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip install --index-url "${TORCH_INDEX}" "torch==${TORCH}" \
    && python -m pip install -r requirements.txt \
    && python -m pip install "boto3==$(python -c 'import botocore; print(botocore.__version__)')"

FROM base AS gpu-packages
# In one go with vLLM, which needs one certain torch: pip finds it within pyproject's range.
RUN python requirements.py vllm --extras-only >> requirements.txt \
    && python -m pip install -r requirements.txt \
    && python -m pip install "boto3==$(python -c 'import botocore; print(botocore.__version__)')"

# The project itself, for KubeRay's RayJob and RayService; under `ray job submit --working-dir .` that copy goes first.
FROM scratch AS project
COPY README.md LICENSE /srv/roro/
COPY roro_ray /srv/roro/roro_ray
COPY actors /srv/roro/actors
COPY jobs /srv/roro/jobs
COPY serve /srv/roro/serve
COPY configs /srv/roro/configs

# The user is named by number: Kubernetes lets a pod that must not be root start only where it can see that.
FROM cpu-packages AS cpu
COPY --from=project /srv/roro ./
RUN python -m pip install --no-deps .
USER 1000
VOLUME /var/lib/roro
CMD ["bash"]

FROM gpu-packages AS gpu
COPY --from=project /srv/roro ./
RUN python -m pip install --no-deps .
USER 1000
VOLUME /var/lib/roro
CMD ["bash"]
