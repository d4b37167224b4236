interface Props {
  label: string;
  min: number;
  max?: number;
  step?: number | "any";
  placeholder?: string;
  required?: boolean;
  disabled?: boolean;
  /** As it is typed. */
  value: string;
  change(value: string): void;
}

export function NumberField({ label, step = 1, value, change, ...limits }: Props) {
  return (
    <label class="field">
      {label}
      <input
        type="number"
        inputMode={step === "any" ? "decimal" : "numeric"}
        step={step}
        value={value}
        onInput={(event) => change(event.currentTarget.value)}
        {...limits}
      />
    </label>
  );
}
