# celltron on CPUs, at the versions that its tests are run with. Build at the root of the repository:
#   docker build --file docker/cpu.Dockerfile --tag celltron:cpu .
# Run, with your cells in the current folder:
#   docker run --rm --init --user "$(id -u):$(id -g)" --volume "$PWD:/data" --workdir /data \
#       celltron:cpu info cells.store

FROM python:3.11-slim

LABEL org.opencontainers.image.title="celltron" \
      org.opencontainers.image.description="Train foundation models of cells, from counts to Hugging Face, on CPUs" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim"

RUN useradd --create-home --uid 1001 celltron
WORKDIR /opt/celltron

# What others make, in layers that are made anew only when a version or a pyproject.toml changes. PyTorch comes first
# and from its CPU index: that of the general index brings gigabytes of CUDA.
COPY constraints.txt ./
RUN pip install --no-cache-dir --no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch
COPY docker/list_requirements.py docker/
COPY pyproject.toml ./
COPY sub-packages/celltron-core/pyproject.toml sub-packages/celltron-core/
COPY sub-packages/celltron-cells/pyproject.toml sub-packages/celltron-cells/
COPY sub-packages/celltron-models/pyproject.toml sub-packages/celltron-models/
COPY sub-packages/celltron-train/pyproject.toml sub-packages/celltron-train/
RUN python docker/list_requirements.py hf s3 http wandb tensorboard > docker/requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r docker/requirements.txt

# celltron itself. Its files are the user's, since compiled kernels are kept beside them.
COPY --chown=celltron:celltron README.md LICENSE ./
COPY --chown=celltron:celltron sub-packages sub-packages
COPY --chown=celltron:celltron src src
COPY --chown=celltron:celltron recipes recipes
RUN pip install --no-cache-dir --no-deps --no-build-isolation -c constraints.txt \
        -e sub-packages/celltron-core -e sub-packages/celltron-cells -e sub-packages/celltron-models \
        -e sub-packages/celltron-train -e .

USER 1001
WORKDIR /home/celltron
# A name for whatever number --user gives: PyTorch asks for one.
ENV USER=celltron
RUN celltron --version
ENTRYPOINT ["celltron"]
CMD ["--help"]
