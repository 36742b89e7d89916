"""Networks and images to try things on: the paper's CIFAR networks, and a trained demo network."""

from eigendamage.zoo._demo import demo_network as demo_network
from eigendamage.zoo._folder import RGB_MEAN as RGB_MEAN
from eigendamage.zoo._folder import RGB_STD as RGB_STD
from eigendamage.zoo._folder import find_splits as find_splits
from eigendamage.zoo._folder import load_images as load_images
from eigendamage.zoo._images import ImageBatches as ImageBatches
from eigendamage.zoo._images import ImageSet as ImageSet
from eigendamage.zoo._images import fashion_mnist as fashion_mnist
from eigendamage.zoo._preresnet import preresnet as preresnet
from eigendamage.zoo._preresnet import preresnet29 as preresnet29
from eigendamage.zoo._registry import MODELS as MODELS
from eigendamage.zoo._registry import get as get
from eigendamage.zoo._resnet import resnet as resnet
from eigendamage.zoo._resnet import resnet20 as resnet20
from eigendamage.zoo._resnet import resnet32 as resnet32
from eigendamage.zoo._resnet import resnet44 as resnet44
from eigendamage.zoo._resnet import resnet56 as resnet56
from eigendamage.zoo._resnet import wide_resnet32 as wide_resnet32
from eigendamage.zoo._vgg import vgg19 as vgg19
from eigendamage.zoo._weights import load_weights as load_weights
