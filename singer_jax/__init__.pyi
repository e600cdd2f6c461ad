from .data.registry import TrainingDataSettings
from .errors import InputError, RunError, Stopped
from .library import create_model, distill, list_models, load_model, save_model
from .methods import METHODS, nullspace
from .methods.base import Batch, FrozenVariable, Method, ModelFeatures
from .methods.fitnet import FitNet, FitNetSettings
from .methods.logit_kd import LogitKD, LogitKDSettings
from .methods.match import LossSettings, MatchSettings, SpaceSettings
from .methods.nullspace import NullSpaceSettings
from .methods.pooled import Pooled, PooledSettings
from .methods.relational import Relational, RelationalSettings
from .methods.singer import Singer, SingerSettings
from .methods.supervised import Supervised, SupervisedSettings
from .methods.vitkd import ViTKD, ViTKDOfficial, ViTKDOfficialSettings, ViTKDSettings
from .methods.weighted_sum import WeightedSum, WeightedSumSettings
from .models.architecture import Architecture, ComputePolicy
from .models.network import StudentSettings, TeacherSettings
from .models.vit import VisionTransformer
from .settings.ranges import Range
from .settings.settings import Settings, setting
from .training.settings import DistillSettings, StudentsSettings, StudentVariant
