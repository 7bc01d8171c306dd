"""The keys of experiment trackers. None of them sends anything unless the user asks."""

from __future__ import annotations

from typing import Any, ClassVar

from axolotl.config.section import PositiveFloat, PositiveInt, Section, Text, idle, later, secret


class TrackingSection(Section):
    """Where figures of the run go. Nothing is sent anywhere unless a key here asks for it."""

    title: ClassVar[str] = "Tracking"

    use_tensorboard: bool = False
    """Write figures for TensorBoard into output_dir."""
    use_wandb: bool | None = None
    """Send figures to Weights & Biases; on when wandb_project is set."""
    wandb_project: Text | None = None
    """Project on Weights & Biases."""
    wandb_entity: Text | None = None
    """User or team on Weights & Biases."""
    wandb_name: Text | None = None
    """Name of the run on Weights & Biases."""
    wandb_run_id: Text | None = None
    """Id of the run, to continue it."""
    wandb_mode: Text | None = None
    """online, offline or disabled."""
    wandb_watch: Text | None = None
    """What to record of the model: gradients, parameters, all."""
    wandb_log_model: Text | None = None
    """Upload weights: checkpoint, or end."""
    use_mlflow: bool | None = None
    """Send figures to MLflow."""
    mlflow_tracking_uri: Text | None = None
    """Address of the MLflow server."""
    mlflow_experiment_name: Text | None = None
    """Experiment on MLflow."""
    mlflow_run_name: Text | None = None
    """Name of the run on MLflow."""
    hf_mlflow_log_artifacts: bool | None = None
    """Upload checkpoints to MLflow."""
    use_comet: bool | None = None
    """Send figures to Comet."""
    comet_api_key: Text | None = secret()
    """Key for Comet; better kept in the environment variable COMET_API_KEY."""
    comet_workspace: Text | None = None
    """Workspace on Comet."""
    comet_project_name: Text | None = None
    """Project on Comet."""
    comet_experiment_key: Text | None = None
    """Id of the experiment, to continue it."""
    comet_mode: Text | None = None
    """Continue an experiment (get), start one (create), or decide by itself (get_or_create)."""
    comet_online: bool | None = None
    """Send at once instead of writing to disk."""
    comet_experiment_config: dict[str, Any] | None = idle("Comet's own settings are used")
    """Further options of Comet."""
    use_trackio: bool | None = None
    """Log figures with Trackio; on when trackio_project_name is set."""
    trackio_project_name: Text | None = None
    """Project on Trackio."""
    trackio_run_name: Text | None = None
    """Name of the run on Trackio."""
    trackio_space_id: Text | None = None
    """Hub Space to which Trackio sends; unset keeps everything on this machine."""
    tracker_timeout: PositiveFloat = 60.0
    """Seconds that the beginning and the end of a run wait for a tracker before they go on without it."""
    use_otel_metrics: bool = later("OpenTelemetry metrics", False)
    """Serve figures in OpenTelemetry's form."""
    otel_metrics_host: Text = later("OpenTelemetry metrics", "localhost")
    """Address on which they are served."""
    otel_metrics_port: PositiveInt = later("OpenTelemetry metrics", 8000)
    """Port on which they are served."""
    use_swanlab: bool = later("SwanLab", False)
    """Send figures to SwanLab."""
    swanlab_project: Text | None = later("SwanLab")
    """Project on SwanLab."""
    swanlab_experiment_name: Text | None = later("SwanLab")
    """Name of the run on SwanLab."""
    swanlab_description: Text | None = later("SwanLab")
    """Description of the run."""
    swanlab_mode: Text | None = later("SwanLab")
    """cloud, local, offline or disabled."""
    swanlab_workspace: Text | None = later("SwanLab")
    """Workspace on SwanLab."""
    swanlab_api_key: Text | None = later("SwanLab", secret=True)
    """Key for SwanLab."""
    swanlab_log_model: bool = later("SwanLab", False)
    """Upload checkpoints."""
    swanlab_web_host: Text | None = later("SwanLab")
    """Address of SwanLab's pages."""
    swanlab_api_host: Text | None = later("SwanLab")
    """Address of SwanLab's service."""
    swanlab_lark_webhook_url: Text | None = later("SwanLab", secret=True)
    """Address for messages to Lark."""
    swanlab_lark_secret: Text | None = later("SwanLab", secret=True)
    """Secret for messages to Lark."""
    swanlab_log_completions: bool = later("SwanLab", True)
    """Log generated answers."""
    swanlab_completion_log_interval: PositiveInt = later("SwanLab", 100)
    """Steps between them."""
    swanlab_completion_max_buffer: PositiveInt = later("SwanLab", 128)
    """Most answers kept for a log."""
