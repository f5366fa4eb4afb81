/** A canvas as wide as its place and as sharp as the screen, drawn again when its size or the colours change. */
import { useEffect, useRef } from "preact/hooks";
import { colours } from "../common/theme";

interface Props {
  height: number;
  label: string;
  /** Draws in CSS pixels. */
  draw: (context: CanvasRenderingContext2D, width: number, height: number) => void;
  onPoint?: (x: number, y: number, event: PointerEvent) => void;
  onLeave?: () => void;
}

export function Canvas({ height, label, draw, onPoint, onLeave }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const drawing = useRef(draw);
  drawing.current = draw;

  function redraw() {
    const element = canvas.current;
    if (!element) return;
    const scale = devicePixelRatio || 1;
    const width = element.clientWidth;
    element.width = Math.round(width * scale);
    element.height = Math.round(height * scale);
    const context = element.getContext("2d")!;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    drawing.current(context, width, height);
  }

  useEffect(() => {
    const observer = new ResizeObserver(redraw);
    observer.observe(canvas.current!);
    return () => observer.disconnect();
  }, [height]);
  void colours.value;
  useEffect(redraw);

  return (
    <canvas
      ref={canvas}
      role="img"
      aria-label={label}
      style={{ height: `${height}px` }}
      onPointerMove={(event) => {
        const box = canvas.current!.getBoundingClientRect();
        onPoint?.(event.clientX - box.left, event.clientY - box.top, event);
      }}
      onPointerLeave={onLeave}
    />
  );
}
