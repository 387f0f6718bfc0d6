# `make` lists the targets. scripts/job does the work of each $(job): runner, checks, set-up, run. Variables given to
# make reach it through the environment. The container's command lines are in docker-compose.yml.
.DEFAULT_GOAL := help
.NOTPARALLEL:
job = @export OWNER=$$PPID; exec scripts/job $@
TARGETS := help $(shell sed -n 's/^\([a-z0-9-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))
VARIABLES := RUN COCO_DIR ARGS CONF A B ONNX WEIGHTS SCHEMES SEEDS RUNNER ACCEL GPUS SHM_SIZE MEM_LIMIT APP_UID APP_GID IMAGE \
	TENSORBOARD_PORT BASE_IMAGE CA_BUNDLE PIP_INDEX_URL PYTHON HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy \
	no_proxy DOCKER_HOST CUDA_VISIBLE_DEVICES SHELL

# A word that make does not know ends it in one line that says what was meant.
quoted = '$(subst ','\'',$1)'
meant = $(shell TARGETS='$(TARGETS)' VARIABLES='$(VARIABLES)' scripts/meant $1 $(call quoted,$2))
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
$(foreach v,$(filter-out $(VARIABLES),$(GIVEN)),$(error $v=$(value $v): $(subst @,$(value $v),$(call meant,variable,$v))))
$(foreach word,$(filter-out $(TARGETS),$(MAKECMDGOALS)),$(error $(word): $(call meant,target,$(word))))
$(if $(and $(filter A B,$(GIVEN)),$(filter-out compare,$(MAKECMDGOALS))),$(error A=... and B=... are for make compare))
$(if $(and $(filter ONNX,$(GIVEN)),$(filter-out eval,$(MAKECMDGOALS))),$(error ONNX=... is for make eval))
$(if $(and $(filter SCHEMES SEEDS,$(GIVEN)),$(filter-out sweep,$(MAKECMDGOALS))),$(error SCHEMES=... and SEEDS=... are for make sweep))
$(if $(and $(filter WEIGHTS,$(GIVEN)),$(filter-out import-weights,$(MAKECMDGOALS))),\
	$(error WEIGHTS=... is for make import-weights; a training takes ARGS="--set train.weights=FILE"))

# What a variable holds is text, `$` too: make expands nothing in it.
$(foreach v,RUN COCO_DIR ARGS CONF A B ONNX WEIGHTS SCHEMES SEEDS,$(if $(filter command,$(origin $v)),$(eval override $v := $$(value $v))$(eval export $v)))

##@ Start here
smoke: ; $(job) ## the whole job on a small drawn dataset, minutes on two cores
test: ; $(job) ## unit and component tests

##@ The job, stage by stage
data: ; $(job) ## check COCO and prepare it for training
train-fp16: ; $(job) ## train the FP16 (AMP) baseline
train-qat: ; $(job) ## train with 4-bit weights (quant.scheme)
import-weights: ; $(job) ## WEIGHTS=best.pt, a trained YOLOv10 of anybody, in place of the baseline's training
ptq: ; $(job) ## the trained baseline, quantized without training
export: ; $(job) ## checkpoints to ONNX
eval: ; $(job) ## score the ONNX files with COCO's metrics (ONNX=file.onnx: any file, without a run)
report: ; $(job) ## runs/RUN/summary.md and .html (ARGS="--runs B C": summary-with-B-C, merged with other seeds)
compare: ; $(job) ## A=runs/a B=runs/b, two runs or scored folders: AP by class, images that differ -> runs/compare
publish: ; $(job) ## the report without weights and photos to runs/reports/RUN, entry in runs/LOG.md
all: ; $(job) ## data, both trainings, ptq, export, eval, report
sweep: ; $(job) ## SCHEMES="w4a16 w8a16 my.yaml" SEEDS="0 1 2": all of them, one report (ARGS=--dry-run: only hours)
schemes: ; $(job) ## bits, share and bytes of the layers (ARGS="--scheme my.yaml"), without training
sensitivity: ; $(job) ## what each layer alone costs at 2 to 8 bits (ARGS="--budget 3.0MB": a scheme that fits)
bench: ; $(job) ## step times and stability, side by side

##@ Around it
estimate: ; $(job) ## hours, memory and disk that the whole job takes on this machine
download-coco: ; $(job) ## fetch COCO 2017 into COCO_DIR (20 GB on the wire, 45 GB while unpacking)
draw: ; $(job) ## draw a dataset of COCO's size and layout into COCO_DIR (20 GB), to rehearse a full run
tensorboard: ; $(job) ## every run, live, on http://localhost:6006 (TENSORBOARD_PORT=6007: another port)
build: ; $(job) ## build the image (RUNNER=local: the .venv)
lint: ; $(job) ## ruff, pyright, import-linter
soak: ; $(job) ## 50 random kills (-9) of small trainings, each compared with an uninterrupted one

test-container: ## tests of the image, from outside (needs a Docker engine)
	@scripts/image
	@python3 -m unittest -v tests/container/test_container.py
	@scripts/uv venv --quiet --allow-existing .build/tools
	@scripts/uv pip install --quiet --python .build/tools --only-binary :all: --require-hashes -r .ci/tools.lock
	@.build/tools/bin/hadolint Dockerfile
	@.build/tools/bin/shellcheck -x .ci/run docs/cluster/slurm.sh $(wildcard scripts/*)

lock: ## resolve requirements.in into requirements.lock
	@scripts/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		requirements.in -o requirements.lock

stop: ## stop running containers of this folder; jobs save their state first
	@docker ps -q --filter "label=com.docker.compose.project.working_dir=$$(pwd -P)" | xargs -r docker stop >/dev/null

clean: ## delete .venv, caches, image and compiled kernels; runs/ and data/ stay
	@rm -rf .venv .build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find app tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@! docker info >/dev/null 2>&1 || { docker compose --profile job down --rmi all --remove-orphans; \
		docker volume ls -q --filter name=w4a16-detector-cache- | xargs -r docker volume rm; }

help:
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile
	@printf '\n%s\n' 'Variables'
	@printf '  %-21s %s\n' \
		RUN=name 'folder under runs/ (default full; smoke, soak, bench, sweep: so named)' \
		COCO_DIR=path 'COCO folder (default data/coco; smoke: the drawn dataset)' \
		ARGS='"--set key=value"' 'settings, all in conf/base.yaml; --force runs again' \
		CONF=file.yaml 'settings from files' \
		'RUNNER=docker|local' 'default: docker where an engine answers' \
		'ACCEL=gpu|cpu' 'default: gpu where there is one' \
		'GPUS=n|all' 'GPUs that the job sees; a training uses all of them (default 1)'

.PHONY: $(TARGETS)
