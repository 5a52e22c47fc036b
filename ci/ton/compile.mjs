// compile.mjs SOURCE.tolk OUT.boc: compiles a contract and prints its code hash.
import { readFileSync, writeFileSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { runTolkCompiler } from '@ton/tolk-js'

const [source, out] = process.argv.slice(2)
const result = await runTolkCompiler({
    entrypointFileName: basename(source),
    fsReadCallback: (path) => readFileSync(join(dirname(source), path), 'utf8'),
})
if (result.status === 'error') {
    console.error(result.message)
    process.exit(1)
}
writeFileSync(out, Buffer.from(result.codeBoc64, 'base64'))
console.log(`${basename(source)}\t${result.codeHashHex.toLowerCase()}`)
