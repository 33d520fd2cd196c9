# celltron on CUDA. Build at the root of the repository:
#   docker build --tag celltron:cuda .
# Run, with your cells in the current folder:
#   docker run --rm --init --gpus all --ipc=host --user "$(id -u):$(id -g)" --volume "$PWD:/data" --workdir /data \
#       celltron:cuda info cells.store
# On several GPUs: --entrypoint torchrun celltron:cuda --standalone --nproc-per-node=8 -m celltron.cli.main train ...

# PyTorch 2.14 (a preview), Transformer Engine and apex are those of this image. 26.07 has a preview of 2.13, which is
# older than the 2.13 that celltron asks for.
FROM nvcr.io/nvidia/pytorch:26.08-py3

LABEL org.opencontainers.image.title="celltron" \
      org.opencontainers.image.description="Train foundation models of cells, from counts to Hugging Face, on GPUs" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/pytorch:26.08-py3"

RUN useradd --create-home --uid 1001 celltron
WORKDIR /opt/celltron

# What others make, in a layer that is made anew only when a pyproject.toml changes. The constraint is all that the
# image has: pip may add to it, and stops where it would have to replace PyTorch or anything else.
COPY docker/list_requirements.py docker/
COPY pyproject.toml ./
COPY sub-packages/celltron-core/pyproject.toml sub-packages/celltron-core/
COPY sub-packages/celltron-cells/pyproject.toml sub-packages/celltron-cells/
COPY sub-packages/celltron-models/pyproject.toml sub-packages/celltron-models/
COPY sub-packages/celltron-train/pyproject.toml sub-packages/celltron-train/
RUN pip list --format=freeze > docker/installed.txt \
    && python docker/list_requirements.py hf s3 http > docker/requirements.txt \
    && pip install --no-cache-dir -c docker/installed.txt -r docker/requirements.txt

# celltron itself. Its files are the user's, since compiled kernels are kept beside them.
COPY --chown=celltron:celltron README.md LICENSE ./
COPY --chown=celltron:celltron sub-packages sub-packages
COPY --chown=celltron:celltron src src
COPY --chown=celltron:celltron recipes recipes
RUN pip install --no-cache-dir --no-deps --no-build-isolation -c docker/installed.txt \
        -e sub-packages/celltron-core -e sub-packages/celltron-cells -e sub-packages/celltron-models \
        -e sub-packages/celltron-train -e .

USER 1001
WORKDIR /home/celltron
# A name for whatever number --user gives: PyTorch asks for one.
ENV USER=celltron
RUN celltron --version
ENTRYPOINT ["celltron"]
CMD ["--help"]
