// sandbox.mjs: reads a JSON list of { config, account, message, now, lt } from stdin,
// runs each message with the reference emulator, and prints a JSON list of what came
// of it.
import { readFileSync } from 'node:fs'
import { Cell, loadTransaction } from '@ton/core'
import { Executor } from '@ton/sandbox'

const executor = await Executor.create()
const out = []
for (const run of JSON.parse(readFileSync(0, 'utf8'))) {
    const { result } = await executor.runTransaction({
        config: run.config,
        libs: null,
        verbosity: 'short',
        shardAccount: run.account,
        message: Cell.fromBase64(run.message),
        now: run.now,
        lt: BigInt(run.lt),
        randomSeed: null,
        ignoreChksig: false,
        debugEnabled: false,
    })
    if (!result.success) {
        // An external message that was not accepted.
        out.push(result.vmResults ? { exit: result.vmResults.vmExitCode } : { error: result.error })
        continue
    }
    const cell = Cell.fromBase64(result.transaction)
    const compute = loadTransaction(cell.beginParse()).description.computePhase
    out.push({
        transaction: cell.hash().toString('hex'),
        account: Cell.fromBase64(result.shardAccount).hash().toString('hex'),
        gas: compute.type === 'vm' ? Number(compute.gasUsed) : 0,
        exit: compute.type === 'vm' ? compute.exitCode : -1,
    })
}
console.log(JSON.stringify(out))
