import { useEffect, useState } from "preact/hooks";
import { getService, sleep } from "../api/client";
import type { Service } from "../api/types";

const RETRY_MILLISECONDS = 2000;

/** What the service is, once it has answered; until then, whether it fails to. */
export function useService(): { service: Service | null; silent: boolean } {
  const [service, setService] = useState<Service | null>(null);
  const [silent, setSilent] = useState(false);
  useEffect(() => {
    let left = false;
    (async () => {
      while (!left) {
        try {
          setService(await getService());
          setSilent(false);
          return;
        } catch {
          setSilent(true);
          await sleep(RETRY_MILLISECONDS);
        }
      }
    })();
    return () => {
      left = true;
    };
  }, []);
  return { service, silent };
}
