"""The GAN term of DMD2: a discriminator that reads the critic's features of noised clips.

Yin et al. 2405.14867, section 4.3. With D the logit that critic and discriminator together give a
clip, real clips z and the student's clips G, both noised to score times s, the non-saturating
logistic losses are

    critic and discriminator    mean softplus(-D(z_s)) + mean softplus(D(G_s))
    student                     mean softplus(-D(G_s))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fastvideo import flow
from fastvideo_train.methods._distill import Clips, at, wide
from fastvideo_train.roles import Role


@dataclass(frozen=True)
class Gan:
    """Both losses for the roles `critic` and `discriminator`.

    num_layers: how many of the critic's layers make the features; None is half of them.
    """

    num_layers: int | None = None

    def check(self, roles: Mapping[str, Role]) -> None:
        """Raise `ValueError` if the critic has fewer layers, or other tokens than were told."""
        critic = roles["critic"].family.Config.parse(roles["critic"].config)
        if self.num_layers is not None and self.num_layers > critic.num_layers:
            raise ValueError(
                f"method.args.gan_layers {self.num_layers} is more than the critic's layers;"
                f" nearest: {critic.num_layers}"
            )
        told = roles["discriminator"].net.config.dim
        if told != critic.dim:
            raise ValueError(
                f"roles.discriminator.config.dim {told} is not the channels of the critic's tokens;"
                f" nearest: {critic.dim}"
            )

    def student_loss(
        self, clips: Clips, roles: Mapping[str, Role], x0: Tensor, sigma_B: Tensor
    ) -> Tensor:
        """Return what the student pays for clips x0 (B, C, T, H, W) that look unreal."""
        noise = clips.noise("gan/student/fake")
        return F.softplus(-self.logits(clips, roles, x0, noise, sigma_B)).mean()

    def critic_loss(
        self, clips: Clips, roles: Mapping[str, Role], x0: Tensor, sigma_B: Tensor
    ) -> Tensor:
        """Return what it costs to take x0 for real, and the clips of the batch for the student's.

        Both are seen at the same times, each under noise of its own.
        """
        real, fake = clips.noise("gan/critic/real"), clips.noise("gan/critic/fake")
        real_B = self.logits(clips, roles, clips.clean, real, sigma_B)
        fake_B = self.logits(clips, roles, x0, fake, sigma_B)
        return F.softplus(-real_B).mean() + F.softplus(fake_B).mean()

    def logits(
        self, clips: Clips, roles: Mapping[str, Role], x0: Tensor, noise: Tensor, sigma_B: Tensor
    ) -> Tensor:
        """Return D (B,) of clips that noise carries to their times, in float32."""
        critic, x = roles["critic"], flow.mix(x0, noise, wide(sigma_B))  # B C T H W
        depth = critic.family.Config.parse(critic.config).num_layers
        num_layers = -(-depth // 2) if self.num_layers is None else self.num_layers
        features_BLC = clips.features(critic, num_layers)(x, at(sigma_B, x))
        logit_B: Tensor = roles["discriminator"].net(features_BLC)
        return logit_B.float()
