/** Each request and each prefix has a hue of its own, which it keeps. */
import { colour } from "../common/theme";

const GOLDEN_ANGLE = 137.508;

export function hue(number: number): string {
  return `hsl(${((number * GOLDEN_ANGLE + 215) % 360).toFixed(1)} ${colour("hue-s")} ${colour("hue-l")})`;
}
